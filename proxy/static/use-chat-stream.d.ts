/**
 * A React hook for a chat that streams, on top of stream-client.js. React 18 and newer; your bundler finds it.
 *
 *     const { messages, sendMessage, currentResponse, isStreaming, error, stop, retry } =
 *       useChatStream({ url: "/api/chat/stream" });
 *
 * @module
 */
import { ChatError } from "./stream-client.js";
export type ChatMessage = {
    role: string;
    content: string;
    incomplete?: boolean;
};
export type UseChatStreamOptions = Omit<import("./stream-client.js").StreamOptions, "signal"> & {
    request?: Omit<import("./stream-client.js").ChatRequest, "messages" | "stream">;
    initialMessages?: ChatMessage[];
};
export type ChatStream = {
    /**
     * what was said, without the answer that is being given
     */
    messages: ChatMessage[];
    /**
     * asks; settles when the answer has ended. While one
     * is being given it does nothing
     */
    sendMessage: (content: string) => Promise<void>;
    /**
     * from the question to the end of the answer
     */
    isStreaming: boolean;
    /**
     * the answer so far
     */
    currentResponse: string;
    /**
     * why the last answer is not whole; null after a stop
     */
    error: ChatError | null;
    /**
     * ends the answer; what has come stays
     */
    stop: () => void;
    /**
     * asks the last question again, in place of its incomplete answer
     */
    retry: () => Promise<void>;
};
/**
 * A message of the conversation. `incomplete`: it was stopped, or its stream broke.
 * @typedef {{ role: string, content: string, incomplete?: boolean }} ChatMessage
 */
/**
 * Everything that streamChat takes, but the signal, which is the hook's own.
 * @typedef {Omit<import("./stream-client.js").StreamOptions, "signal"> & {
 *   request?: Omit<import("./stream-client.js").ChatRequest, "messages" | "stream">,
 *   initialMessages?: ChatMessage[],
 * }} UseChatStreamOptions
 * `request`: the model and its parameters, the same for every question.
 */
/**
 * @typedef {object} ChatStream
 * @property {ChatMessage[]} messages what was said, without the answer that is being given
 * @property {(content: string) => Promise<void>} sendMessage asks; settles when the answer has ended. While one
 *   is being given it does nothing
 * @property {boolean} isStreaming from the question to the end of the answer
 * @property {string} currentResponse the answer so far
 * @property {ChatError | null} error why the last answer is not whole; null after a stop
 * @property {() => void} stop ends the answer; what has come stays
 * @property {() => Promise<void>} retry asks the last question again, in place of its incomplete answer
 */
/**
 * @param {UseChatStreamOptions} [options] may change with every render; a question takes the newest
 * @returns {ChatStream}
 */
export declare function useChatStream(options?: UseChatStreamOptions): ChatStream;
