"""One GPU session: stage 5 and stage 4 candidates, compiled, checked, timed.   PYTHONPATH=kernels python experiments/ab.py [c128 f128 c64 f64 s4]

1. 16 worker processes compile the candidates and check each against fp32 (FA3's 2x rule, LSE, two equal runs, outputs poisoned with NaN,
   inputs that trip the guard); a worker that hangs or dies is killed and its candidate is out.
2. One process times, per grid problem, FA3 twice and the candidates that passed, in a random order a round behind spins (round 1: at the
   order of tiles of `choose_config`; round 2: the best two with both orders and four sizes of head groups).
Prints the best of each problem and a table (ratio to the faster FA3 slot). Writes $OUT/ab.json if OUT is set. Names are in CANDIDATES.
"""
import dataclasses, importlib.util, json, math, multiprocessing as mp, os, queue, random, statistics, sys, time, traceback
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, os.path.join(ROOT, "kernels"))
WHAT = set(sys.argv[1:]) & {"c128", "f128", "c64", "f64", "s4"} or {"c128", "f128", "c64", "f64", "s4"}
PARALLEL, LIMIT, DEADLINE = min(16, os.cpu_count() or 1), 60, float(os.environ.setdefault("AB_DEADLINE", str(time.time() + float(os.environ.get("AB_SECONDS", 230)))))  # children inherit it
SEQLENS = (512, 1024, 2048, 4096, 8192, 16384)
CLASSES = {"c128": (128, True), "f128": (128, False), "c64": (64, True), "f64": (64, False)}

STEP = dict(boundary="step", early_q=True)
C128 = dict(headdim=128, causal=True, half_diagonal=True)
F128 = dict(headdim=128, causal=False)
TWO = dict(headdim=64, num_buffers=3, overlap="others")
THREE = dict(headdim=64, consumers=3, num_buffers=3, num_q_buffers=2, q_in_registers=False, overlap="others")
C2 = dict(TWO, causal=True, half_diagonal=True, l2_bytes=16 << 20)
C3 = dict(THREE, causal=True)
F2, F3 = dict(TWO, causal=False), dict(THREE, causal=False)
FIX, OTH, SC, IS, K3 = dict(fixed_diagonal=True), dict(overlap="others"), dict(turn="scores"), dict(turn="issued"), dict(num_k_buffers=3)
CANDIDATES = {
    "c128": {
        "base": C128, "fix_q": {**C128, **FIX, "early_q": True}, "oth_sc": {**C128, **OTH, **SC},
        "step": {**C128, **FIX, **STEP}, "step_sc": {**C128, **FIX, **STEP, **SC}, "step_k3": {**C128, **FIX, **STEP, **K3},
        "step_rows": {**C128, **STEP}, "step_lateq": {**C128, **FIX, "boundary": "step"}, "step_whole": {**C128, **STEP, "half_diagonal": False},
        "step_o": {**C128, **FIX, **STEP, **OTH}, "step_osc": {**C128, **FIX, **STEP, **OTH, **SC},
        "step_ois": {**C128, **FIX, **STEP, **OTH, **IS}, "step_osc_k3": {**C128, **FIX, **STEP, **OTH, **SC, **K3},
    },
    "f128": {
        "base": F128, "q": {**F128, "early_q": True}, "oth_sc": {**F128, **OTH, **SC}, "step": {**F128, **STEP}, "step_sc": {**F128, **STEP, **SC},
        "step_lateq": {**F128, "boundary": "step"}, "step_k3": {**F128, **STEP, **K3}, "step_o": {**F128, **STEP, **OTH},
        "step_osc": {**F128, **STEP, **OTH, **SC}, "step_osc_k3": {**F128, **STEP, **OTH, **SC, **K3},
    },
    "c64": {
        "w2": C2, "w2_sc": {**C2, **FIX, **SC, "early_q": True}, "w2_step": {**C2, **FIX, **STEP}, "w2_step_sc": {**C2, **FIX, **STEP, **SC},
        "w2_step_is": {**C2, **FIX, **STEP, **IS}, "w2_step_whole": {**C2, **STEP, **SC, "half_diagonal": False},
        "w2_step_own": {**C2, **FIX, **STEP, **SC, "overlap": "own"},
        "w3": C3, "w3_sc": {**C3, **SC, "early_q": True}, "w3_step": {**C3, **STEP}, "w3_step_sc": {**C3, **STEP, **SC},
        "w3_step_is": {**C3, **STEP, **IS}, "w3_step_sc_4": {**C3, **STEP, **SC, "num_buffers": 4},
    },
    "f64": {
        "w3": {**F3, "boundary": "scores"}, "w3_sc": {**F3, **SC, "boundary": "scores"}, "w3_apart_sc": {**F3, **SC}, "w3_step": {**F3, **STEP},
        "w3_step_sc": {**F3, **STEP, **SC}, "w3_step_is": {**F3, **STEP, **IS}, "w3_step_sc_4": {**F3, **STEP, **SC, "num_buffers": 4},
        "w2": {**F2, "boundary": "scores"}, "w2_step": {**F2, **STEP}, "w2_step_sc": {**F2, **STEP, **SC},
    },
    "s4": {  # options of stage 4 at headdim 64, or a file of experiments/ladder with its own defaults
        "now": {}, "q2": dict(num_q_buffers=2), "apart_q2": dict(num_q_buffers=2, masks_apart=True), "oth": dict(overlap="others"),
        "oth_q2": dict(overlap="others", num_q_buffers=2), "oth_q2_apart": dict(overlap="others", num_q_buffers=2, masks_apart=True),
        "oth_q2_apart_b2": dict(overlap="others", num_q_buffers=2, masks_apart=True, num_buffers=2),
        "oth_q2_apart_l16": dict(overlap="others", num_q_buffers=2, masks_apart=True, l2_bytes=16 << 20),
        "before": "exp4_base", "noinc": "exp4_noinc", "both": "exp4_both", "splitn": "exp4_splitn",
    },
}
S4_TESTED = [(64, True), (64, False)]


def candidates():
    """name -> (class, forward's arguments): causal ones of stage 5 in both orders of tiles."""
    out = {}
    for kind, options in CANDIDATES.items():
        if kind not in WHAT:
            continue
        for name, c in options.items():
            if kind == "s4":
                out[f"s4/{name}"] = c
            elif CLASSES[kind][1]:
                for order in ("pairs", "dynamic"):
                    out[f"{kind}/{name}/{order[0].upper()}"] = dict(c, schedule=order)
            else:
                out[f"{kind}/{name}"] = c
    return out


def forward_of(name, options, **more):
    if name.startswith("s4"):
        if isinstance(options, str):
            spec = importlib.util.spec_from_file_location(options, os.path.join(ROOT, "experiments", "ladder", options + ".py"))
            module = importlib.util.module_from_spec(spec)
            sys.modules[options] = module
            spec.loader.exec_module(module)
            return module.forward
        from attn_ladder import stage4_pipeline as s4
        config = dataclasses.replace(s4.CONFIGS[64], **options)
        return lambda *a, **k: s4.forward(*a, config=config, **k)
    from attn_ladder import stage5_everything as s5
    config = s5.Config(**{**options, **more})
    return lambda *a, **k: s5.forward(*a, config=config, **k)


# ---------------------------------------------------------------- checks
def problems(causal, three):
    """(batch, seqlen_q, seqlen_k, nheads, nheads_k, kind)"""
    out = [(2, 512, 512, 8, 8, "randn"), (2, 384, 384, 4, 2, "randn"), (1, 128, 128, 2, 2, "randn"), (1, 256, 1024, 4, 4, "randn"), (8, 2048, 2048, 32, 8, "randn"),
           (16, 512, 512, 32, 32, "randn"), (1, 4096, 4096, 4, 4, "x8"), (2, 1024, 1024, 8, 8, "big"), (1, 8192, 8192, 2, 2, "grow_last"), (12, 1280, 1280, 16, 16, "grow_some")]
    return out + [(2, 1024, 1024, 8, 8, k) for k in ("grow_first", "grow_middle", "grow_last")]


def make(p, headdim):
    import torch
    b, sq, sk, h, hk, kind = p
    g = torch.Generator("cuda").manual_seed(sq + 7 * sk + h)
    q, k, v = (torch.randn(b, s, n, headdim, generator=g, device="cuda").bfloat16() for s, n in ((sq, h), (sk, hk), (sk, hk)))
    if kind == "x8": q.mul_(8)
    if kind == "big": q.mul_(40)
    if kind.startswith("grow"):  # blocks are visited from the last key on: small keys there make the reference far too small
        q.mul_(40)
        if kind == "grow_first": k[:, : max(1, sk // 8)].mul_(0.01)
        if kind == "grow_middle": k[:, sk // 3 : sk // 2].mul_(0.01); k[:, -128:].mul_(0.01)
        if kind == "grow_last": k[:, -128:].mul_(0.01)
        if kind == "grow_some": q[1::2].div_(40); k[::5, -128:].mul_(0.01)
    return q, k, v


def check(forward, headdim, causal, three):
    """Faults in words, and the largest error as a part of what is allowed."""
    import torch
    from attn_ladder.reference import attention_reference, error_bound
    bad, worst, real = [], 0.0, torch.empty
    def poisoned(*a, **kw):
        x = real(*a, **kw)
        return x.fill_(float("nan")) if x.is_cuda and x.is_floating_point() else x
    for p in problems(causal, three):
        q, k, v = make(p, headdim)
        torch.empty = poisoned
        try:
            (out, lse), (out2, lse2) = forward(q, k, v, causal=causal), forward(q, k, v, causal=causal)
        finally:
            torch.empty = real
        torch.cuda.synchronize()
        if not (torch.equal(out.view(torch.int16), out2.view(torch.int16)) and torch.equal(lse, lse2)): bad.append(f"{p} two runs differ")
        if out.isnan().any() or lse.isnan().any(): bad.append(f"{p} NaN {int(out.isnan().sum())}")
        g = p[3] // p[4]
        for b, hk in {(0, 0), (p[0] - 1, p[4] - 1), (p[0] // 2, p[4] // 2)}:
            hs = slice(hk * g, hk * g + g) if p[1] <= 2048 else slice(hk * g, hk * g + 1)
            a = (q[b : b + 1, :, hs], k[b : b + 1, :, hk : hk + 1], v[b : b + 1, :, hk : hk + 1])
            ref, rl = attention_reference(*a, causal=causal)
            bound, _ = error_bound(ref, attention_reference(*a, causal=causal, upcast=False)[0])
            err = (out[b : b + 1, :, hs].float() - ref).abs().max().item()
            worst = max(worst, err / bound)
            if not err <= bound: bad.append(f"{p} b{b} h{hk} error {err:.3g} > {bound:.3g}")
            le = ((lse[b : b + 1, hs] - rl).abs() / (1 + rl.abs() * 0.1)).max().item()
            if not le <= 2e-3: bad.append(f"{p} lse {le:.3g}")
    return bad, worst


def worker(jobs, out):
    try:
        import torch
        torch.zeros(1, device="cuda")
        for name, options in jobs:
            out.put((name, "start", None)); t = time.time()
            try:
                forward, faults, worst = forward_of(name, options), [], 0.0
                for headdim, causal in S4_TESTED if name.startswith("s4") else [CLASSES[name.split("/")[0]]]:
                    bad, w = check(forward, headdim, causal, "w3" in name)
                    faults += bad; worst = max(worst, w)
                out.put((name, "done", (faults, round(worst, 3), round(time.time() - t, 1))))
            except Exception as e:
                out.put((name, "done", (["EXC " + "".join(traceback.format_exception(e))[-400:].replace("\n", " ")], -1, 0)))
    except BaseException as e:
        out.put((jobs[0][0], "done", ([repr(e)[:200]], -1, 0)))


def run_checks(items):
    context = mp.get_context("spawn"); out = context.Queue(); results, live = {}, {}
    share = [list(items.items())[i::PARALLEL] for i in range(PARALLEL)]
    owner = {name: w for w, jobs in enumerate(share) for name, _ in jobs}
    def start(w, jobs):
        if jobs:
            p = context.Process(target=worker, args=(jobs, out), daemon=True); p.start(); live[w] = [p, jobs, time.time()]
    for w, jobs in enumerate(share): start(w, jobs)
    while live:
        try:
            name, what, value = out.get(timeout=0.2)
            if owner[name] in live: live[owner[name]][2] = time.time()
            if what == "done": results[name] = value
            continue
        except queue.Empty:
            pass
        for w, (p, jobs, t) in list(live.items()):
            left = [j for j in jobs if j[0] not in results]
            if not left: p.join(3); p.kill(); live.pop(w); continue
            if not p.is_alive() or time.time() - t > LIMIT or time.time() > DEADLINE - 60:
                results[left[0][0]] = (["HANG" if p.is_alive() else f"DIED {p.exitcode}"], -1, LIMIT)
                p.kill(); p.join(); live.pop(w)
                if time.time() < DEADLINE - 60: start(w, left[1:])
                else: results.update({n: (["no time"], -1, 0) for n, _ in left[1:]})
    return results


# ---------------------------------------------------------------- timing
def measure(fs, rounds, flush, events, rng):
    import torch
    times = {n: [] for n in fs}
    for _ in range(rounds):
        order = list(fs); rng.shuffle(order)
        for i, n in enumerate(order):
            flush.bitwise_not_(); torch.cuda._sleep(700_000); events[2 * i].record(); fs[n](); events[2 * i + 1].record()
        torch.cuda.synchronize()
        for i, n in enumerate(order): times[n].append(events[2 * i].elapsed_time(events[2 * i + 1]) * 1e3)
    return {n: statistics.median(t[2:]) for n, t in times.items()}


def timing(good, out):
    import torch
    from attn_ladder import stage5_everything as s5
    try:
        from attn_ladder.stage import load
        fa3 = load("fa3").forward
    except Exception as e:
        print("no FA3:", repr(e)[:200], "- ratios are to the shipped configuration"); fa3 = s5.forward
    print(torch.cuda.get_device_name(), torch.__version__, flush=True)
    flush = torch.empty(100 << 20, dtype=torch.int8, device="cuda"); rng = random.Random(1)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(200)]
    todo = [(kind, s) for s in (2048, 8192, 512, 4096, 1024, 16384) for kind in ("c128", "c64", "f64", "f128") if kind in WHAT]
    if "s4" in WHAT: todo.insert(0, ("s4", 2048))
    for kind, s in todo:
        if time.time() > DEADLINE - 8: print("out of time before", kind, s); break
        headdim, causal = (64, True) if kind == "s4" else CLASSES[kind]
        b, h = (16, 16) if kind == "s4" else (16384 // s, 2048 // headdim)
        q, k, v = (torch.randn(b, s, h, headdim, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        call = lambda f: lambda: f(q, k, v, causal=causal)
        letter = "P" if s <= (2048 if headdim == 128 else 512) else "D"
        chosen = [n for n in good if n.startswith(kind + "/") and (kind == "s4" or not causal or n.endswith("/" + letter))]
        peers = {"fa3": call(fa3), "fa3b": call(fa3), "shipped": call(s5.forward)}
        t = measure({**peers, **{n: call(forward_of(n, good[n])) for n in chosen}}, 18, flush, events, rng)
        base = min(t["fa3"], t["fa3b"]); ratios = {n: base / x for n, x in t.items() if not n.startswith("fa3")}
        row = dict(kind=kind, s=s, fa3_us=base, aa=t["fa3b"] / t["fa3"], ratios=ratios, tuned={})
        if kind != "s4" and time.time() < DEADLINE - 25:
            best = sorted(chosen, key=ratios.get)[-2:]
            names = {n[:-1] + x for n in best for x in "PD"} & set(good) if causal else set(best)
            fs = {f"{n}@{mb}": call(forward_of(n, good[n], l2_bytes=mb << 20)) for n in names for mb in ((8, 16, 32, 64) if causal else (32,))}
            t = measure({**peers, **fs}, 14, flush, events, rng); base = min(t["fa3"], t["fa3b"])
            row["tuned"] = {n: base / x for n, x in t.items() if not n.startswith("fa3")}
        out.put(row)
    out.put(None)


def main():
    begun = time.time(); items = candidates()
    results = run_checks(items)
    good = {n: c for n, c in items.items() if not results.get(n, (["?"],))[0]}
    print(f"checks {time.time() - begun:.0f} s, {len(good)} of {len(items)} good, largest error {max([r[1] for r in results.values()], default=0)} of the bound")
    faulty = {}
    for n, r in results.items():
        if r[0]: faulty.setdefault(r[0][0][:150], []).append(n)
    for fault, names in list(faulty.items())[:12]: print("BAD", " ".join(names)[:160], "|", fault)
    context = mp.get_context("spawn"); out = context.Queue(); rows = []
    p = context.Process(target=timing, args=(good, out), daemon=True); p.start()
    while time.time() < DEADLINE + 5:
        try:
            row = out.get(timeout=1)
            if row is None: break
            rows.append(row)
        except queue.Empty:
            if not p.is_alive(): print("timing DIED", p.exitcode); break
    else: print("timing killed")
    p.kill()
    if os.environ.get("OUT"): json.dump(dict(checks=results, rows=rows), open(os.path.join(os.environ["OUT"], "ab.json"), "w"))
    order = {k: i for i, k in enumerate(("s4", "c128", "f128", "c64", "f64"))}
    rows.sort(key=lambda r: (order[r["kind"]], r["s"]))
    print("BEST (ratio to FA3; @: MB of keys and values a group of heads)"); finals = []
    for r in rows:
        everything = {**{n: x for n, x in r["ratios"].items() if n != "shipped"}, **{n: x for n, x in r["tuned"].items() if n != "shipped"}}
        top = sorted(everything.items(), key=lambda x: -x[1])[:3]
        if r["kind"] != "s4" and top: finals.append((top[0][1], r["tuned"].get("shipped", r["ratios"]["shipped"])))
        print(f"{r['kind']:4s} {r['s']:5d} fa3 {r['fa3_us']:6.0f} us A/A {r['aa']:.3f} shipped {r['ratios']['shipped']:.3f} {r['tuned'].get('shipped', 0):.3f} |", " ".join(f"{n.split('/', 1)[1]} {x:.3f}" for n, x in top))
    if finals: print(f"median of {len(finals)}: best {statistics.median(x for x, _ in finals):.3f} min {min(x for x, _ in finals):.3f}; shipped {statistics.median(x for _, x in finals):.3f} min {min(x for _, x in finals):.3f}")
    for kind in ("s4", "c128", "f128", "c64", "f64"):
        rs = [r for r in rows if r["kind"] == kind]
        if not rs: continue
        print(f"{kind:16s}" + "".join(f"{r['s']:7d}" for r in rs))
        for name in CANDIDATES[kind]:
            cells = [next((x for n, x in r["ratios"].items() if n.split("/")[:2] == [kind, name]), None) for r in rs]
            print(f"{name:16s}" + "".join("      -" if x is None else f"{x:7.3f}" for x in cells))
    print(f"total {time.time() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    main()
