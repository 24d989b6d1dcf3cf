"""Headrace: a streaming reverse proxy for OpenAI-compatible LLM APIs.

Reading order, one line a module; imports only go upwards in this list.

rules (no I/O, no clock of their own)
    errors      what can go wrong, whose fault it is, what the caller is told
    address     listener addresses as people write them
    patterns    model names with * and ?
    yamlstruct  YAML text into Structs, with the path of every mistake
    schema      every key of the configuration: default, unit, check
    config      loads a configuration, and checks it as a whole
    endpoints   the allow-list of methods and paths
    headers     which fields cross the proxy
    peek        what a JSON body says about routing and cost
    form        what a multipart form says about routing
    bucket      token bucket (GCRA) arithmetic
    breaker     whether an upstream is asked at all: closed, half-open, open
    retry       whether a request is tried again, after how long, and the budget for it
    routing     who is asked next: upstream, model, key
    outgoing    what every request to an upstream carries, and where it goes
    fairqueue   who goes next, and how fast a queue drains
    usage       the tokens an answer used: reported, estimated or unknown
    preamble    what comes before an answer and is no part of it
    sse         where a stream stands: boundary, first token, terminator, usage
    inject      usage asked for on a caller's behalf, and its chunk taken out again
    pricing     what the tokens cost, exactly
    ledger_row  a row of the ledger
    tokens      what a request will take, before anybody has counted
    sse_events  an event stream cut into its events
    answers     which of an upstream's answers are passed on
    wrap        plain JSON as a stream, for who asked for one
    identity    who calls: API keys, and what a caller may do
    webtoken    JSON Web Tokens as credentials
    handshake   what the opening of a WebSocket says
    socket_events  what the messages of a WebSocket session say
resources
    listen      listening sockets
    systemd     sockets that systemd has opened, and what it is told
    downlink    what the kernel knows of a caller's connection
    breakoff    the end of a connection whose answer is not complete
    log         the request line, and a sink that never blocks
    outcome     what the end of a request adds to the metrics
    metrics     every metric, named once
    footprint   what a process costs: memory, descriptors, CPU time, collections
    tasks       the one way to start a background task
    control     the channel between processes
    chunked     HTTP/1.1's chunks: bytes into one, and out of one
    sender      a body that is sent piece by piece, while its answer may be coming
    wire_connection  a pooled connection: the C parser, and what it feeds
    wire        one exchange on a pooled connection, below ClientSession
    pool        connections of one upstream: kept, aged, made ahead
    health      active probes
    session     the same exchange through aiohttp's public client
    upstream    an upstream: address, credential, pool
    state/ errors, table, memory, lua, link, redis, guarded
    sqlitefile  SQLite databases as files
    keystore/ base, sqlite, redis
    keys        the keys a process knows, and the pepper
    jwks        an identity service's public keys
    jwtauth     from a JSON Web Token to its Principal
    authenticator  from a credential to its Principal
    shared      the memory that all processes count in, and who owns what in it
    stores      the stores of limits, as one process uses them
    ledger_file  the ledger's table, for the one that writes it
    ledger_read  questions to ledger files
    ledger      one row a request, written by one thread
    ledger_link  a worker's way to the ledger
data path
    budgets     what may be spent: dollars a day and a month
    targets     a model's upstreams, ready to be chosen
    permit      slots a request holds; taken at once, or not at all
    slots       the waiting room: who finds no slot waits there
    slots_remote  the waiting room of several workers, in the supervisor
    context     what one request knows about itself
    seat        the shared slots of one request, over failovers and hedges
    allotment   what a caller's plan asks of the stores, prepared once
    admission   what a caller may use: rates, tokens, dollars, slots
    accounting  what a request reserves because of its cost, and its one settlement
    turnstile   how many requests may begin in one turn of the event loop
    core        what all requests of a process share
    intake      the body: whole, bounded, timed
    uploads     the body of an upload: no faster than the upstream takes it
    pipe        bytes from upstream to caller
    reshape     answers that are changed on their way
    verify      streams whose bytes are compared: as they came, and as they went
    hold        answers that have to be here before they are passed on
    tap         what an answer used, heard on its way
    drain_usage the rest of an answer, read for its usage after the caller has left
    attempt     one try at one upstream
    ready       an answer's head as bytes, past aiohttp's multi-dicts and signals
    deliver     the answer on its way to the caller: head, bytes, end
    forward     the attempts of one request: whom, again, how long to wait
    dial        the opening of a WebSocket to an upstream
    websocket   a WebSocket session: messages both ways, and its end
web
    middleware/ request_id, observe, errors, turn, guard, cors, auth, limits
    key_order   what people write to get a key
    key_commands  keys, for the command line and the admin API
    token_commands  tokens of our own, for the command line
    usage_report  sums of the ledger for people and programs
    usage_chart  money a day as an SVG
    browser_api what a web page may ask without a key, and its answer's shape
    proxied     requests that go upstream: body, model, cost, place
    realtime    WebSocket sessions: who may open one, with which model
    page_files  pages and their parts, as they are served
    playground  the page that tries models out, and the browser client
    probe_stream  events that cost nothing, to test a public chain
    handlers    the routes, and what is answered here
    downstream_connection  one caller's connection: its requests in turn, what the parser refuses, its timers
    downstream  the listening side: connections and their number
    admin_keys  the keys on the admin listener
    spend_page  what was spent, as a page of the admin listener
    admin_guard who may ask the admin listener, and what a browser may
    admin       the admin listener
    live_view   what the live view shows
    live_feed   one look a second for everybody who watches
    live_page   what runs now, as a page of the admin listener
composition
    server      the data plane of one process: builds everything once; reloads, drains
    workers     workers as the front sees them, in this process or in another
    worker      a worker process
    keeper      keeps one worker process alive
    crew        all workers of a front, seen as one
    handover    the two ends of a restart
    supervisor  binds the sockets, runs the workers, holds the admin listener; reload, restart
    usage_verify  counters against rows
    cli_source  where a command's configuration comes from
    cli_serve   the commands that are the proxy: serve, and its workers
    cli_check   the command that looks at a configuration
    cli_admin   the commands to a running server
    cli_keys    the commands about keys
    cli_token   the command about tokens
    cli_usage   the command about tokens and money
    cli_bench   the command that hands over to bench/
    cli_mock    the command that is an upstream
    top         the running requests as a table
    cli_top     the command that shows them
    doctor_findings  what is wrong with a chain, and how it is told
    doctor_rules  what a chain's behaviour means
    doctor_asks   questions to a chain, their answers timed
    doctor      who between callers and Headrace buffers, compresses, cuts or drops
    cli_doctor  the command that asks
    cli         the commands by name; each is loaded when it is called
beside
    mock_behaviour  how the mock upstream answers: one field a fault
    mock_ask    what a request asks it for, and the words that answer it
    mock_providers  the quirks that it imitates, a row a provider
    mock_chat   its chat/completions, completions, embeddings, models
    mock_events its responses and messages: dialects of named events
    mock_dialects  its routes, how each answers and fails
    mock_wire   one answer of it on the wire, and how it goes wrong there
    mock        the mock upstream
    client_errors  why there is no answer: nine kinds
    client_events  an event stream as deltas
    client_limits  limits that a program keeps by itself
    client_exchange  one request: its attempts, and its answer
    client_stream  an answer for who reads it
    client      the client for Python programs

Not in Python: `static/`, the pages (playground, live view) and the browser client.
"""

__version__ = "0.1.0"
