"""Forty bad inputs, and four more: what is promised for each, and the tests that prove it.

The inputs themselves, byte by byte, are in heads.py, bodies.py and served.py. What holds for all of them
(nothing upstream, nothing of the input in answer, log or metrics, no slot held, the next caller served) is in
test_inputs.py.
"""

from __future__ import annotations

from tests.kit.tables import Row, Table

_INPUTS = "tests/hostile/test_inputs.py::test_"
HTTP = "tests/test_http.py::"
AUTH = "tests/test_auth.py::"
CORS = "tests/test_cors.py::"


def refused(number: int, what: str, promise: str, *others: str) -> Row:
    return Row(number, what, promise, (f"{_INPUTS}refused[row{number:02d}", *others))


def served(number: int, what: str, promise: str, *others: str) -> Row:
    return Row(number, what, promise, (f"{_INPUTS}served[row{number:02d}", *others))


def extra(number: int, what: str, promise: str, *proofs: str) -> Row:
    return Row(number, what, promise, proofs, extra=True)


TABLE = Table(
    "Bad inputs: forty, and four more",
    (
        refused(1, "Content-Length and Transfer-Encoding", "400, close"),
        refused(2, "two different Content-Length", "400, close"),
        refused(3, "two equal Content-Length; `1, 1`", "400, close"),
        refused(4, "Content-Length +1, -1, 1_0, 0x1", "400, close"),
        refused(5, "Transfer-Encoding xchunked, identity, chunked twice", "400 or 501, close"),
        refused(6, "Transfer-Encoding gzip, chunked", "400 or 501, close"),
        refused(7, "Transfer-Encoding, empty", "400, close"),
        refused(8, "chunked on HTTP/1.0", "400, close"),
        refused(9, "chunk sizes: -1, 17 digits, bare LF", "400, close"),
        served(
            10,
            "trailers: Authorization, Host; extensions",
            "served; they go nowhere; what breaks the framing is 400",
            f"{_INPUTS}refused[row10",
            f"{HTTP}test_chunked_body_and_trailers",
        ),
        refused(11, "bare LF as a line end", "400, close"),
        refused(12, "CR, NUL, 0x01 in a value", "400, close; in neither answer nor log"),
        refused(13, "obs-fold", "400, close"),
        refused(
            14,
            "space before a colon, empty name; `_` in a name",
            "400, close; with `_`: dropped, no credential",
            f"{_INPUTS}served[row14",
            f"{AUTH}test_the_fields_that_carry_a_key",
        ),
        refused(15, "no Host, two Hosts", "400, close"),
        refused(16, "Host empty, `a b`, user@h, h:99999", "400, close", f"{HTTP}test_good_hosts"),
        refused(17, "absolute-form target", "400, close; nobody is asked"),
        refused(18, "//evil, \\\\evil, /%5cevil", "404 or 400"),
        refused(
            19,
            "/v1/../admin, %2e%2e, %2f, %00",
            "404, nothing is normalised into a match",
            f"{HTTP}test_unknown_paths",
        ),
        refused(20, "@evil, evil, bytes above 0x7f", "400, close"),
        refused(21, "CONNECT", "405, close"),
        refused(22, "TRACE; OPTIONS *", "405, close; 404"),
        refused(
            23,
            "HTTP/0.9, HTTP/2.0, the preface",
            "400 or 505 in our version, close",
            f"{HTTP}test_refusals_are_in_our_version",
        ),
        refused(24, "long request line, field, name; 200 fields", "414 or 431, close"),
        refused(
            25,
            "Content-Length over the limit",
            "413 at once, no 100, close",
            f"{HTTP}test_no_100_before_a_refusal",
            f"{HTTP}test_413_reaches_a_caller_that_still_sends",
        ),
        refused(
            26,
            "chunked body over the limit",
            "413, close; memory stays flat",
            f"{HTTP}test_all_bodies_over_their_limit",
            "tests/hostile/test_memory.py::test_endless_body",
        ),
        refused(
            27,
            "Expect: 100-continue without a valid key",
            "401, and no 100",
            f"{AUTH}test_a_body_is_not_asked_for_before_the_key_is_known",
        ),
        refused(28, "another Expect", "417, close"),
        refused(
            29,
            "coded bodies; a bomb; other types",
            "415; never decoded",
            "tests/hostile/test_memory.py::test_bombs",
        ),
        refused(30, "two different credentials", "400", f"{AUTH}test_two_different_credentials_are_none"),
        refused(
            31,
            "credential empty, Basic, 10 kB, not ASCII, unknown, revoked",
            "401 and a challenge; one body for all",
            f"{AUTH}test_whatever_is_wrong_with_a_key_the_answer_is_the_same",
        ),
        refused(
            32,
            "JWT: none, HS256 with the public key, kid, jku",
            "401; no address of it is asked",
            "tests/hostile/test_tokens.py::test_forged_tokens",
            "tests/test_identity.py::test_hostile_tokens",
            "tests/test_jwks.py::test_invented_key_ids_fetch_little_and_only_the_configured_address",
        ),
        refused(
            33,
            "JWT: expired, aud, iss, no exp, nbf, 9 kB",
            "401",
            "tests/hostile/test_tokens.py::test_forged_tokens",
            "tests/test_identity.py::test_hostile_tokens",
        ),
        refused(34, "no JSON: array, UTF-16, NaN, depth, digits", "400, never 500"),
        refused(35, "two `model` keys, one escaped", "400 duplicate_key"),
        refused(
            36,
            "model missing, a number, 100 kB, unknown, not allowed",
            "400, 404, 403",
            f"{AUTH}test_models",
        ),
        refused(37, 'stream "false", n 10^9, max_tokens -1', "400"),
        served(
            38,
            "x-request-id and User-Agent with CRLF, 1 kB, emoji, jndi",
            "the id is replaced; none of it in the log",
            f"{HTTP}test_request_id_replaced",
            f"{HTTP}test_queries_are_not_logged",
        ),
        served(
            39,
            "Connection names our fields; Upgrade",
            "served without it, our fields are whole, no 101",
            f"{HTTP}test_connection_cannot_remove_our_fields",
            f"{HTTP}test_upgrade_is_declined",
        ),
        served(
            40,
            "Origin evil, null; preflight; X-Forwarded-For of a stranger",
            "no CORS field; 404; the socket's address counts",
            f"{_INPUTS}refused[row40",
            f"{CORS}test_strangers_are_served_and_read_nothing",
            f"{CORS}test_preflight_of_a_stranger",
            f"{HTTP}test_client_ip",
            f"{AUTH}test_each_address_is_spent_alone",
        ),
        extra(
            41,
            "60 pipelined requests, then gone",
            "nothing is held",
            f"{HTTP}test_sixty_pipelined_requests_then_gone",
        ),
        extra(42, "TLS, SSH or noise on the plain port", "400, close", f"{_INPUTS}refused[row42"),
        extra(43, "/metrics and admin paths on the data port", "404", f"{_INPUTS}refused[row43"),
        extra(
            44,
            "200 x slow head, body, reader",
            "total deadlines; a good caller's p99 within 5x",
            "tests/hostile/test_slow.py::test_two_hundred",
            "tests/hostile/test_slow.py::test_who_goes_on_after_a_refusal_is_cut_off",
            f"{HTTP}test_second_head_dribble",
            f"{HTTP}test_half_sent_heads_are_not_idle_for_ever",
            "tests/test_uploads.py::test_no_progress",
        ),
    ),
)
