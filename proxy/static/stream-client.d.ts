/**
 * A small client for streaming chat completions: an async iterator over what the model says.
 *
 *     import { streamChat } from "./stream-client.js";
 *     for await (const delta of streamChat({ messages }, { url: "/api/chat/stream" })) show(delta.content);
 *
 * It reads Server-Sent Events however they are cut (WHATWG HTML, 9.2), tells every failure's kind apart, asks
 * again only while nothing has been delivered, waits as long as the server says, and takes a stream that ends
 * without its terminator for what it is: truncated. No dependencies; browsers, Node 18 and newer, Deno, Bun.
 *
 * @module
 */
export type Category = "network" | "auth" | "rate_limit" | "server" | "timeout" | "parse" | "aborted" | "truncated" | "request";
export type Message = {
    role: string;
    content: unknown;
    [field: string]: unknown;
};
export type ChatRequest = {
    messages: ReadonlyArray<Message>;
    model?: string;
    stream?: boolean;
    temperature?: number;
    max_tokens?: number;
    [field: string]: unknown;
};
export type Usage = {
    prompt_tokens?: number;
    completion_tokens?: number;
    total_tokens?: number;
    [field: string]: unknown;
};
export type Delta = {
    content: string;
    finishReason: string | null;
    usage: Usage | null;
    chunk: Record<string, any>;
};
export type Head = {
    status: number;
    headers: Headers;
    requestId: string | null;
    attempt: number;
};
export type StreamOptions = {
    /**
     * default `/v1/chat/completions`
     */
    url?: string;
    /**
     * sent as `Authorization: Bearer`
     */
    apiKey?: string;
    /**
     * more header fields
     */
    headers?: Record<string, string>;
    /**
     * ends the request, its pauses and the stream
     */
    signal?: AbortSignal;
    /**
     * further attempts, default 2
     */
    retries?: number;
    /**
     * the first back-off is a random part of this, default 0.5
     */
    baseDelay?: number;
    /**
     * no back-off is longer, default 8
     */
    maxDelay?: number;
    /**
     * a longer Retry-After is not waited for but thrown, default 60
     */
    maxRetryAfter?: number;
    /**
     * until the head of the answer, default 300
     */
    timeout?: number;
    /**
     * silence between bytes, comments included, default 120
     */
    idleTimeout?: number;
    /**
     * called with the head of every answer, failures included
     */
    onResponse?: (head: Head) => void;
    /**
     * before a pause
     */
    onRetry?: (retry: {
        error: ChatError;
        delay: number;
        attempt: number;
    }) => void;
    /**
     * default `globalThis.fetch`
     */
    fetch?: typeof globalThis.fetch;
    /**
     * in [0, 1), default `Math.random`
     */
    random?: () => number;
};
export type ErrorDetails = {
    /**
     * of the answer, if there was one
     */
    status?: number | null;
    /**
     * the server's `error.code`
     */
    code?: string | null;
    /**
     * the server's `error.type`
     */
    type?: string | null;
    /**
     * the server's `error.param`
     */
    param?: string | null;
    /**
     * what to ask the operator about
     */
    requestId?: string | null;
    /**
     * whether asking again may help
     */
    retryable?: boolean;
    /**
     * seconds, if the server says when
     */
    retryAfter?: number | null;
    /**
     * what was caught
     */
    cause?: unknown;
};
/**
 * Why there is no (whole) answer.
 *
 * - `network`: no answer at all: DNS, connection, TLS, CORS
 * - `auth`: 401 or 403
 * - `rate_limit`: 429
 * - `server`: any 5xx, and an error that the stream itself tells
 * - `timeout`: 408 or 504, or silence longer than this client waits
 * - `parse`: an answer that is no chat completion
 * - `aborted`: by your AbortSignal
 * - `truncated`: the stream ended before its terminator
 * - `request`: any other 4xx: the same request will fail again
 * @typedef {"network"|"auth"|"rate_limit"|"server"|"timeout"|"parse"|"aborted"|"truncated"|"request"} Category
 */
/**
 * One message of a conversation. Other fields are sent as they are.
 * @typedef {{ role: string, content: unknown, [field: string]: unknown }} Message
 */
/**
 * The body of the request: a chat completion as OpenAI defines it. `stream` is true unless you say otherwise.
 * @typedef {{ messages: ReadonlyArray<Message>, model?: string, stream?: boolean, temperature?: number,
 *   max_tokens?: number, [field: string]: unknown }} ChatRequest
 */
/**
 * What an answer used, as the provider reports it.
 * @typedef {{ prompt_tokens?: number, completion_tokens?: number, total_tokens?: number,
 *   [field: string]: unknown }} Usage
 */
/**
 * One step of an answer. `content` may be empty (a role, a tool call, the usage); `chunk` is the whole event.
 * @typedef {{ content: string, finishReason: string | null, usage: Usage | null,
 *   chunk: Record<string, any> }} Delta
 */
/**
 * The head of an answer. `attempt` counts from 1.
 * @typedef {{ status: number, headers: Headers, requestId: string | null, attempt: number }} Head
 */
/**
 * How to ask. Durations are seconds.
 * @typedef {object} StreamOptions
 * @property {string} [url] default `/v1/chat/completions`
 * @property {string} [apiKey] sent as `Authorization: Bearer`
 * @property {Record<string, string>} [headers] more header fields
 * @property {AbortSignal} [signal] ends the request, its pauses and the stream
 * @property {number} [retries] further attempts, default 2
 * @property {number} [baseDelay] the first back-off is a random part of this, default 0.5
 * @property {number} [maxDelay] no back-off is longer, default 8
 * @property {number} [maxRetryAfter] a longer Retry-After is not waited for but thrown, default 60
 * @property {number} [timeout] until the head of the answer, default 300
 * @property {number} [idleTimeout] silence between bytes, comments included, default 120
 * @property {(head: Head) => void} [onResponse] called with the head of every answer, failures included
 * @property {(retry: { error: ChatError, delay: number, attempt: number }) => void} [onRetry] before a pause
 * @property {typeof globalThis.fetch} [fetch] default `globalThis.fetch`
 * @property {() => number} [random] in [0, 1), default `Math.random`
 */
/**
 * @typedef {object} ErrorDetails
 * @property {number | null} [status] of the answer, if there was one
 * @property {string | null} [code] the server's `error.code`
 * @property {string | null} [type] the server's `error.type`
 * @property {string | null} [param] the server's `error.param`
 * @property {string | null} [requestId] what to ask the operator about
 * @property {boolean} [retryable] whether asking again may help
 * @property {number | null} [retryAfter] seconds, if the server says when
 * @property {unknown} [cause] what was caught
 */
/** Every failure of this client. */
export declare class ChatError extends Error {
    /** @type {Category} */
    category: Category;
    /** @type {number | null} */
    status: number | null;
    /** @type {string | null} */
    code: string | null;
    /** @type {string | null} */
    type: string | null;
    /** @type {string | null} */
    param: string | null;
    /** @type {string | null} */
    requestId: string | null;
    /** Whether asking again may help. @type {boolean} */
    retryable: boolean;
    /** Seconds. @type {number | null} */
    retryAfter: number | null;
    /** Whether a part of the answer had been delivered. @type {boolean} */
    partial: boolean;
    /**
     * @param {Category} category
     * @param {string} message
     * @param {ErrorDetails} [details]
     */
    constructor(category: Category, message: string, details?: ErrorDetails);
}
export type ServerSentEvent = {
    event: string;
    data: string;
    id: string | null;
};
/**
 * Reads an event stream from pieces of any size (WHATWG HTML, 9.2.6): line ends CR, LF and CRLF, comments,
 * data of several lines, UTF-8 characters cut in two, a byte order mark at the beginning.
 */
export declare class EventStreamParser {
    #private;
    /**
     * The events that these bytes complete.
     * @param {Uint8Array} bytes
     * @returns {ServerSentEvent[]}
     */
    push(bytes: Uint8Array): ServerSentEvent[];
    /**
     * At the end of the stream: the event that lacks its blank line, if there is one. A browser's EventSource
     * throws it away, but some servers leave the last blank line out.
     * @returns {ServerSentEvent[]}
     */
    end(): ServerSentEvent[];
}
/**
 * Seconds from `retry-after-ms`, else from `Retry-After` (a number or an HTTP date); null if neither says.
 * @param {Headers} headers
 * @param {number} now milliseconds since 1970
 * @returns {number | null}
 */
export declare function retryAfterOf(headers: Headers, now?: number): number | null;
/**
 * Asks, and yields the answer as it comes. Every failure is a ChatError. Until the first delta has been
 * delivered a failure that may pass is tried again; after it, never: you would get the beginning twice.
 * @param {ChatRequest} request
 * @param {StreamOptions} [options]
 * @returns {AsyncGenerator<Delta, void, void>}
 */
export declare function streamChat(request: ChatRequest, options?: StreamOptions): AsyncGenerator<Delta, void, void>;
