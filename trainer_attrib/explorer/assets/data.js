"use strict";
// Where data come from: the server, or the bundle inside a one-file report. Addresses are the same.
(() => {
  const inside = document.getElementById("bundle");
  const bundle = inside ? JSON.parse(inside.textContent) : null;
  const token = document.querySelector('meta[name="explorer-token"]').content;
  const known = new Map();
  TA.live = !bundle;

  TA.address = (path, params = {}) => { // an empty source is the examples without one
    const asked = new URLSearchParams(Object.entries(params).filter(([name, v]) => v != null && (v !== "" || name === "source")));
    return `/${path.split("/").map(encodeURIComponent).join("/")}.json${asked.size ? "?" + asked : ""}`;
  };

  /** Data at an address; remembered unless parameters are given. */
  TA.get = async (path, params) => {
    if (bundle) {
      if (!(path in bundle)) throw new Error("This is not in the report: open the explorer for it.");
      return bundle[path];
    }
    const at = TA.address(path, params);
    if (!params && known.has(at)) return known.get(at);
    const answer = await fetch(at, { headers: { "x-trainer-attrib": token } });
    const data = await answer.json();
    if (!answer.ok) throw Object.assign(new Error(data.error || `${answer.status} at ${at}`), { status: answer.status });
    if (answer.status === 202) { await TA.watch(data); return TA.get(path, params); }
    if (!params) known.set(at, data);
    return data;
  };
  TA.forget = () => known.clear();

  /** Ask for work; resolves to the key of its answer. */
  TA.ask = async (kind, fields) => {
    const answer = await fetch(TA.address(`ask/${kind}`, fields), { headers: { "x-trainer-attrib": token } });
    const data = await answer.json();
    if (!answer.ok) throw new Error(data.error);
    return data.state === "done" ? data.answer : TA.watch(data);
  };

  /** Show a job's progress until it ends; resolves to the key of its answer. */
  TA.watch = async (job) => {
    const bar = TA.h("progress"), said = TA.h("span", {}, job.title);
    const stop = TA.h("button", { click: () => fetch(`/jobs/${job.job}/cancel.json`, { headers: { "x-trainer-attrib": token } }) }, "Cancel");
    const line = TA.h("div", { class: "job" }, bar, said, stop);
    document.getElementById("status").append(line);
    try {
      while (job.state === "waiting" || job.state === "running") {
        if (job.total) { bar.max = job.total; bar.value = job.done; } else bar.removeAttribute("value");
        said.textContent = `${TA.short(job.title)}: ${job.state}${job.doing ? `, ${job.doing}` : ""}`;
        await new Promise((resolve) => setTimeout(resolve, 250));
        job = await (await fetch(`/jobs/${job.job}.json`)).json();
        if (job.error && !job.job) throw new Error(job.error);
      }
      if (job.state === "cancelled") throw new Error(`${job.title} was cancelled.`);
      if (job.state === "failed") throw new Error(job.error);
      TA.forget();
      return job.answer;
    } finally { line.remove(); }
  };
})();

/** The address after #: #/LEDGER/VIEW[/KEY]?parameters. */
TA.route = () => {
  const [path, query = ""] = decodeURI(location.hash.slice(1)).split("?");
  const [, ledger = "0", view = "ledger", ...rest] = path.split("/");
  return { ledger: /^\d+$/.test(ledger) ? ledger : "0", view: view || "ledger", key: rest.map(decodeURIComponent).join("/"), params: Object.fromEntries(new URLSearchParams(query)) };
};
TA.link = (ledger, view, key = "", params = {}) => {
  const asked = new URLSearchParams(Object.entries(params).filter(([, v]) => v != null && v !== ""));
  return `#/${ledger}/${view}${key ? "/" + encodeURIComponent(key) : ""}${asked.size ? "?" + asked : ""}`;
};
/** Change parameters of the address without leaving the page: what is on screen can be linked to. */
TA.remember = (changes) => {
  const { ledger, view, key, params } = TA.route();
  history.replaceState(null, "", TA.link(ledger, view, key, { ...params, ...changes }));
};
