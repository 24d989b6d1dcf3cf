"""Thirty-five faults: what is promised for each, and the tests that prove it.

Whatever a test does, it ends with the ledger invariant (tests/kit/invariant.py), which `lab` and `pool` check
at their end. test_books.py adds the reservations of tokens and dollars, test_invariant.py that it can fail.
"""

from __future__ import annotations

from tests.kit.tables import Row, Table

BOOKS = "tests/faults/test_books.py::test_reserved_less_refunded_is_charged"
HERE = "tests/faults/test_streams.py::"
STORES_HERE = "tests/faults/test_stores.py::"
STREAMS = "tests/test_streams.py::"
FAILOVER = "tests/test_failover.py::"
BREAKERS = "tests/test_breakers.py::"
LEAVING = "tests/test_leaving.py::"
QUEUE = "tests/test_queue.py::"
SLOTS = "tests/test_slots.py::"
GUARDED = "tests/test_state_guarded.py::"
REDIS = "tests/test_state_redis.py::"
LIMITS = "tests/test_redis_limits.py::"
PROCESSES = "tests/test_processes.py::"
POOL = "tests/test_pool.py::"


def row(number: int, what: str, promise: str, *proofs: str) -> Row:
    return Row(number, what, promise, proofs)


UPSTREAMS = (
    row(
        1,
        "upstream refuses the connection",
        "failover at once; none left: 502; breaker +1; nothing charged",
        f"{FAILOVER}test_no_connection",
        f"{FAILOVER}test_none_left",
        f"{BREAKERS}test_opens",
        "tests/faults/test_books.py::test_nothing_is_charged_where_nothing_was_reached",
    ),
    row(
        2,
        "upstream accepts, never answers",
        "504 at first_byte, connection not kept",
        f"{HERE}test_a_blackhole",
        f"{FAILOVER}test_no_first_byte_in_time",
        f"{BOOKS}[no first byte",
    ),
    row(
        3,
        "closes before the status line, fresh connection, POST",
        "502, asked exactly once",
        f"{FAILOVER}test_a_post_is_not_sent_twice",
        f"{STREAMS}test_an_upstream_that_hangs_up",
        f"{BOOKS}[FIN before an answer",
        f"{BOOKS}[RST before an answer",
    ),
    row(
        4,
        "closes on a reused connection before any byte",
        "one retry on a fresh one, or 502 where not allowed",
        f"{FAILOVER}test_stale",
        f"{FAILOVER}test_stale_is_not_allowed",
        f"{FAILOVER}test_stale_only_once",
    ),
    row(
        5,
        "RST in a chunked stream",
        "all bytes so far, error event, no [DONE], no last chunk; partial row",
        f"{STREAMS}test_a_death_is_visible",
        f"{STREAMS}test_a_death_inside_an_event",
        f"{BOOKS}[RST in the stream",
    ),
    row(
        6,
        "RST in a stream without framing",
        "the same",
        f"{STREAMS}test_a_death_without_framing",
        f"{STREAMS}test_a_bare_end_needs_the_terminator",
    ),
    row(
        7,
        "FIN in a body with a length",
        "the caller's connection is aborted",
        f"{STREAMS}test_a_cut_answer",
        f"{BOOKS}[cut in a whole answer",
    ),
    row(
        8,
        "stall between bytes",
        "error event after the idle time; heartbeats do not put it off",
        f"{STREAMS}test_heartbeats_do_not_hide_a_stall",
        f"{STREAMS}test_a_stalled_answer",
        f"{BOOKS}[stall in the stream",
        f"{BOOKS}[total deadline",
    ),
    row(
        9,
        "rubbish: SSH banner, 20 kB field, two lengths, 101",
        "502, connection closed, nothing of it shown",
        f"{STREAMS}test_rubbish",
        f"{STREAMS}test_a_very_long_field",
        "tests/test_http.py::test_upstream_rubbish",
        "tests/test_wire.py::test_a_spoilt_connection_is_never_used_again",
        f"{BOOKS}[rubbish",
    ),
    row(
        10,
        "10 MB of an event without a newline",
        "passed on unchanged in flat memory, scanned once",
        f"{HERE}test_ten_megabytes_without_a_newline",
    ),
    row(
        11,
        "cuts inside UTF-8, CRLF, every byte alone",
        "identical bytes, the same usage",
        f"{STREAMS}test_bytes_arrive_as_they_were_sent",
        "tests/test_sse.py::test_cuts_change_nothing",
        "tests/test_wire.py::test_a_head_byte_by_byte",
    ),
    row(
        12,
        "429 and 503 with Retry-After",
        "retried in budget, else passed on; a 429 opens no breaker",
        f"{FAILOVER}test_elsewhere_at_once",
        f"{FAILOVER}test_retry_after_is_waited_for",
        f"{FAILOVER}test_a_retry_after_beyond_max",
        f"{FAILOVER}test_the_last_answer_passes_as_it_is",
        f"{BREAKERS}test_does_not_open",
        f"{BOOKS}[503",
        f"{BOOKS}[429",
    ),
    row(
        13,
        "a 401 that quotes our key",
        "502; the key is nowhere",
        f"{STREAMS}test_a_refused_credential_is_ours",
        "tests/test_auth.py::test_an_upstream_that_refuses_us_tells_the_caller_nothing",
        "tests/test_http.py::test_canaries",
        f"{BOOKS}[401",
    ),
    row(
        14,
        "goes on, or stays, after [DONE]",
        "complete; the upstream is closed 100 ms later",
        f"{STREAMS}test_silence_after_the_terminator",
        f"{STREAMS}test_bytes_after_the_terminator",
        f"{STREAMS}test_a_death_after_the_terminator",
    ),
)

CALLERS = (
    row(
        15,
        "slow caller",
        "memory is bounded; ended by timeouts.write, upstream too",
        "tests/test_backpressure.py::test_twenty_readers_that_stop",
        "tests/test_backpressure.py::test_a_slow_reader_slows_its_upstream",
        "tests/test_backpressure.py::test_a_reader_that_never_resumes",
        "tests/test_backpressure.py::test_a_reader_that_never_resumes_a_large_answer",
    ),
    row(
        16,
        "FIN or RST in each phase",
        "upstream closed within 1 s, or never asked; permit free; one row",
        f"{HERE}test_a_caller_that_leaves_in_its_head",
        f"{LEAVING}test_while_sending_its_body",
        f"{QUEUE}test_a_waiter_that_leaves_frees_its_place_and_never_arrives",
        f"{LEAVING}test_while_waiting_for_the_first_byte",
        f"{LEAVING}test_after_the_head_alone",
        f"{LEAVING}test_between_early_comments",
        f"{BOOKS}[caller leaves while it thinks",
        f"{BOOKS}[caller resets while it thinks",
        f"{BOOKS}[caller leaves in the stream",
    ),
    row(
        17,
        "vanishes without a FIN",
        "timeouts.write, or the kernel in 30 s (its option is checked: no network is cut here)",
        f"{HERE}test_what_the_kernel_is_told",
        "tests/test_backpressure.py::test_a_reader_that_never_resumes",
    ),
    row(
        18,
        "the middle one of three in the queue leaves; in the instant of its grant",
        "order kept, no permit lost; too late: 503 with Retry-After",
        f"{SLOTS}test_the_middle_one_leaves",
        f"{SLOTS}test_leaving_in_the_instant_of_the_grant",
        f"{SLOTS}test_cancelled_and_not_yet_awake",
        f"{SLOTS}test_leaving_so_many_steps_after_the_release",
        f"{QUEUE}test_who_waits_too_long_is_told_so",
    ),
)

STORES = (
    row(
        19,
        "Redis is down at the start",
        "starts; decided without it; nobody hangs",
        f"{STORES_HERE}test_redis_is_down_at_the_start",
        f"{GUARDED}test_gone_from_the_start",
        f"{GUARDED}test_nobody_waits_for_a_store_that_is_gone",
    ),
    row(
        20,
        "Redis is killed under load and comes back",
        "bounded delay, local limits meanwhile, nothing charged twice",
        f"{LIMITS}test_redis_killed_under_load_costs_a_budget_once",
        f"{GUARDED}test_killed_and_restarted_under_load",
        f"{GUARDED}test_one_call_is_charged_once_in_each_store",
        f"{LIMITS}test_what_is_decided_without_the_store",
    ),
    row(
        21,
        "Redis is slow",
        "calls end in their budget, the connection goes, no answer to another question",
        f"{LIMITS}test_a_store_that_does_not_answer_in_time_counts_as_gone",
        f"{GUARDED}test_a_bad_network_under_load",
        f"{GUARDED}test_stopped_under_load",
        f"{REDIS}test_no_answer_belongs_to_another_question",
        f"{REDIS}test_acquires_of_unknown_end_leave_nothing",
    ),
    row(
        22,
        "Redis forgets: FLUSHALL, NOSCRIPT, OOM, READONLY",
        "limits begin anew, no request fails",
        f"{LIMITS}test_a_redis_that_forgets_fails_no_request",
        f"{STORES_HERE}test_redis_that_is_full_or_read_only_fails_no_request",
        f"{GUARDED}test_flushes_under_load",
        f"{GUARDED}test_full_memory_under_load",
        f"{GUARDED}test_a_replica_under_load",
        f"{REDIS}test_scripts_are_flushed",
    ),
)

PROCESS = (
    row(
        23,
        "SIGTERM under load; a second one",
        "the short finish, the long are told, readiness first, exit 0; all rows",
        "tests/test_drain.py::test_the_short_finish_and_the_long_are_told",
        "tests/test_drain.py::test_the_admin_listener_stays_and_the_data_listener_goes",
        "tests/test_drain.py::test_a_second_signal_ends_at_once",
        f"{PROCESSES}test_drain_over_all_workers",
    ),
    row(
        24,
        "SIGKILL of a worker",
        "only its streams break; replaced; its slots come back; rows of the finished are there",
        f"{PROCESSES}test_a_killed_worker_takes_only_its_own_streams",
        f"{QUEUE}test_a_killed_worker_gives_back_what_it_holds_and_waits_for",
        "tests/test_ledger.py::test_a_killed_worker_loses_only_what_it_was_doing",
        f"{LIMITS}test_a_killed_nodes_slots_come_back_within_the_lease",
    ),
    row(
        25,
        "a worker hangs",
        "replaced; the other one serves meanwhile",
        f"{PROCESSES}test_a_worker_that_hangs_is_replaced",
    ),
    row(
        26,
        "the wall clock jumps an hour",
        "limits, timers, durations unaffected; tokens end by it",
        "tests/faults/test_clock.py::test_a_stream_goes_on",
        "tests/faults/test_clock.py::test_timers_and_limits_are_monotonic",
        "tests/faults/test_clock.py::test_tokens_end_by_the_wall_clock",
        f"{REDIS}test_time_is_that_of_the_server",
    ),
    row(
        27,
        "64 file descriptors",
        "503 at the cap, health answers, a quiet log, recovers",
        f"{PROCESSES}test_few_file_descriptors",
    ),
    row(
        28,
        "DNS: no such name, no answer, another address",
        "a failure to connect in time; the new address is used",
        f"{POOL}test_no_address",
        f"{POOL}test_dns_ttl",
        f"{POOL}test_a_changed_address",
        f"{FAILOVER}test_no_connection",
    ),
    row(
        29,
        "disk full for the ledger, for the key store",
        "requests are served, rows wait, bounded and counted; no half key",
        "tests/faults/test_full_disk.py::test_a_full_disk_costs_no_request_and_no_row",
        "tests/test_ledger_faults.py::test_disk_full",
        "tests/test_ledger_faults.py::test_memory_is_bounded",
        "tests/faults/test_key_store.py::test_a_full_disk_makes_no_half_key",
    ),
    row(
        30,
        "reload with a mistake, under traffic; 50 in a row",
        "nothing changes and it is said; nothing leaks",
        "tests/test_reload.py::test_a_bad_file_changes_nothing",
        "tests/test_reload.py::test_fifty_reloads_leak_nothing",
        "tests/test_reload.py::test_new_requests_change_and_running_streams_do_not",
    ),
)

CROWDS = (
    row(
        31,
        "thousands of idle connections (6,000)",
        "less than 40 KiB each, p99 of others within 5x, ended by keepalive",
        "tests/test_idle.py::test_six_thousand_idle_connections",
        "tests/test_http.py::test_idle_connections_end_by_keepalive_only",
    ),
    row(
        32,
        "all upstreams unhealthy",
        "503 with Retry-After at once; one trial of fifty",
        f"{BREAKERS}test_refused_at_once",
        f"{BREAKERS}test_exactly_one_of_fifty",
    ),
    row(
        33,
        "retry storm: half of 200 fail",
        "at most 1.2 times as many upstream",
        f"{FAILOVER}test_a_storm",
        "tests/test_retry.py::test_fault_33",
    ),
    row(
        34,
        "standard output is full",
        "nobody waits for it; dropped lines are counted",
        "tests/faults/test_blocked_log.py::test_a_stream_does_not_wait_for_the_log",
        "tests/test_admin.py::test_a_blocked_sink_blocks_nobody",
    ),
    row(
        35,
        "200 slow heads, bodies, readers",
        "the p99 of a good caller within 5x",
        "tests/hostile/test_slow.py::test_two_hundred",
    ),
)

BESIDE = (
    Row(
        0,
        "a whole machine dies under load, and comes back",
        "only its streams break, visibly; limits of both exact; nobody refused",
        ("tests/test_two_machines.py::test_a_machine_dies_and_comes_back_under_load",),
        extra=True,
    ),
)

TABLE = Table("Faults: thirty-five", (*UPSTREAMS, *CALLERS, *STORES, *PROCESS, *CROWDS, *BESIDE))
