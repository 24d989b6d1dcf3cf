/**
 * A React hook for a chat that streams, on top of stream-client.js. React 18 and newer; your bundler finds it.
 *
 *     const { messages, sendMessage, currentResponse, isStreaming, error, stop, retry } =
 *       useChatStream({ url: "/api/chat/stream" });
 *
 * @module
 */

import { useCallback, useEffect, useRef, useState } from "react";
import { ChatError, streamChat } from "./stream-client.js";

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
export function useChatStream(options = {}) {
  const [messages, setMessages] = useState(() => options.initialMessages ?? []);
  const [currentResponse, setCurrentResponse] = useState("");
  const [isStreaming, setIsStreaming] = useState(false);
  const [error, setError] = useState(/** @type {ChatError | null} */ (null));
  // What the functions below read, so that they stay the same from render to render.
  const latest = useRef({ options, messages });
  const running = useRef(/** @type {AbortController | null} */ (null));
  useEffect(() => {
    latest.current.options = options;
  });

  const say = useCallback((/** @type {ChatMessage[]} */ next) => {
    latest.current.messages = next;
    setMessages(next);
  }, []);

  const ask = useCallback(
    async (/** @type {ChatMessage[]} */ conversation) => {
      const controller = new AbortController();
      running.current = controller;
      say(conversation);
      setError(null);
      setCurrentResponse("");
      setIsStreaming(true);
      const show = perFrame(setCurrentResponse);
      const { text, failure } = await listen(conversation, latest.current.options, controller.signal, show);
      show.cancel();
      if (running.current !== controller) return; // unmounted
      running.current = null;
      if (text !== "" || !failure) {
        say([...conversation, { role: "assistant", content: text, ...(failure ? { incomplete: true } : {}) }]);
      }
      setCurrentResponse("");
      setError(failure && failure.category !== "aborted" ? failure : null);
      setIsStreaming(false);
    },
    [say],
  );

  const sendMessage = useCallback(
    async (/** @type {string} */ content) => {
      if (!running.current) await ask([...latest.current.messages, { role: "user", content }]);
    },
    [ask],
  );

  const retry = useCallback(async () => {
    const conversation = latest.current.messages;
    const asked = conversation.at(-1)?.incomplete ? conversation.slice(0, -1) : conversation;
    if (!running.current && asked.at(-1)?.role === "user") await ask(asked);
  }, [ask]);

  const stop = useCallback(() => running.current?.abort(), []);

  useEffect(
    () => () => {
      const controller = running.current;
      running.current = null;
      controller?.abort();
    },
    [],
  );

  return { messages, sendMessage, isStreaming, currentResponse, error, stop, retry };
}

/**
 * The answer to its end.
 * @param {ChatMessage[]} conversation
 * @param {UseChatStreamOptions} options
 * @param {AbortSignal} signal
 * @param {(text: string) => void} show
 * @returns {Promise<{ text: string, failure: ChatError | null }>}
 */
async function listen(conversation, { request, initialMessages, ...options }, signal, show) {
  const messages = conversation.map(({ role, content }) => ({ role, content }));
  let text = "";
  try {
    for await (const delta of streamChat({ ...request, messages }, { ...options, signal })) {
      if (delta.content !== "") show((text += delta.content));
    }
    return { text, failure: null };
  } catch (cause) {
    if (cause instanceof ChatError) return { text, failure: cause };
    return { text, failure: new ChatError("parse", String(cause), { cause }) };
  }
}

/**
 * Renders at most once a frame: a fast model says more than anybody can see.
 * @param {(text: string) => void} render
 */
function perFrame(render) {
  let wanted = "";
  let frame = 0;
  /** @param {string} text */
  const show = (text) => {
    wanted = text;
    frame ||= requestAnimationFrame(() => {
      frame = 0;
      render(wanted);
    });
  };
  show.cancel = () => cancelAnimationFrame(frame);
  return show;
}
