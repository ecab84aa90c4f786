// The browser speaks to Vite alone, so that there is one origin; Vite passes on what is the relay's, and a plugin's.
export default {
  server: {
    proxy: {
      // Not `changeOrigin` here: the relay lets in pages of its own host, and that is whom the browser names.
      "/socket": { target: "http://127.0.0.1:8000", ws: true },
      // The first that fits counts: a plugin in a process of its own goes before the relay's own routes.
      "/api/node-plugin": {
        target: "http://127.0.0.1:8001", // where you serve your new process
        changeOrigin: true,
        rewrite: (path) => path.replace(/^\/api\/node-plugin/, ""),
      },
      "/api": { target: "http://127.0.0.1:8000" },
    },
  },
};
