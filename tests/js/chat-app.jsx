/** A chat as an application would write it; the tests read it by its ids. */

import { StrictMode, useState } from "react";
import { createRoot } from "react-dom/client";
import { useChatStream } from "../../proxy/static/use-chat-stream.js";

const asked = new URLSearchParams(location.search);

function Chat() {
  const [faults, setFaults] = useState(asked.get("faults") ?? "");
  const [shown, setShown] = useState(true);
  return (
    <>
      <input id="faults" value={faults} onChange={(event) => setFaults(event.target.value)} />
      <button id="leave" onClick={() => setShown(false)}>Leave</button>
      {shown && <Conversation faults={faults} />}
    </>
  );
}

function Conversation({ faults }) {
  const { messages, sendMessage, isStreaming, currentResponse, error, stop, retry } = useChatStream({
    url: asked.get("url"),
    headers: faults ? { "x-mock": faults } : {},
    retries: Number(asked.get("retries") ?? 0),
    baseDelay: 0.01,
    request: { model: asked.get("model"), temperature: 0.5 },
    initialMessages: [{ role: "system", content: "Be brief." }],
  });
  return (
    <>
      <ol id="messages">
        {messages.map((message, at) => (
          <li key={at} data-role={message.role} data-incomplete={message.incomplete ?? false}>{message.content}</li>
        ))}
      </ol>
      <p id="current">{currentResponse}</p>
      <p id="state">{isStreaming ? "streaming" : "idle"}</p>
      <p id="error" data-category={error?.category} data-partial={error?.partial}>{error?.message}</p>
      <button id="send" onClick={() => sendMessage("Hello")}>Send</button>
      <button id="stop" onClick={stop}>Stop</button>
      <button id="retry" onClick={retry}>Retry</button>
    </>
  );
}

createRoot(document.getElementById("root")).render(<StrictMode><Chat /></StrictMode>);
