import { Socket } from "phoenix";

const show = (id, value) => (document.getElementById(id).value = value);
const get = async (path) => (await fetch(path)).text();

const socket = new Socket("/socket"); // Vite's own address, which passes it on to the relay
socket.connect();

const calc = socket.channel("calc", {});
calc.on("result", ({ sum }) => show("sum", sum));
calc
  .join()
  .receive("ok", async () => {
    show("state", "joined");
    calc.push("sum", { request_id: "1", numbers: [1, 2, 3] });
    show("plugin", await get("/api/node-plugin/"));
    show("topics", await get("/api/topics"));
  })
  .receive("error", ({ reason }) => show("state", reason));
