# The GPU rules: what is measured on, what is right, how long it takes, what it costs the host, what the counters say,
# and how it serves. Each writes one file of the run; an interrupted one goes on from the partial results beside it.
from attn_ladder.stage import kernel_hash

from attn_profiling import device as found_device
from attn_profiling.config import MODEL
from attn_profiling.settings import once, selected
from attn_profiling.sources import ENTRIES, entry_hash, source_hash


def hardware():
    """GPU and driver of this machine, so that a run that meets others is measured again; None on a head node."""
    try:
        gpu = found_device.open_gpu()
    except found_device.NoGpu:
        return None
    return [gpu.name, gpu.driver]


def kernels(step):
    """What runs in a step of a suite: a changed kernel or selection makes its measurements run again."""

    def of(wildcards):
        where = step or wildcards.regime
        names = selected(PLAN.subjects, config["only"], wildcards.suite, where)
        return {name: kernel_hash(name) for name in names}

    return of


def problems(wildcards):
    return [str(problem) for problem in PLAN.problems[wildcards.suite]]


def profiled(wildcards):
    """The problems that a suite profiles: those that a suite before it holds are left to that one."""

    def subjects(suite):
        return selected(PLAN.subjects, config["only"], suite, "profile")

    order = config["suites"]["profile"]
    return [str(p) for p in once(wildcards.suite, order, PLAN.problems.__getitem__, subjects)]


def sharing(suite):
    """The suites that have problems of a suite."""
    held = set(PLAN.problems[suite])
    return [name for name, problems in PLAN.problems.items() if held & set(problems)]


def checks(wildcards):
    """The checks that cover a suite: its own, or those of the suites whose problems it is made of."""
    known = config["suites"]["check"]
    suites = [wildcards.suite] if wildcards.suite in known else sharing(wildcards.suite)
    return [f"{RAW}/check/{suite}.json" for suite in suites if suite in known]


def timed(suites):
    """Spaced timings that choose the configurations of peers; they only come first."""
    known = config["suites"]["time"]["spaced"]
    return ancient([f"{RAW}/timing/{suite}.spaced.json" for suite in known if suite in suites])


def served(wildcards):
    """What runs in a part of serving."""
    ours = "transformers" if wildcards.part == MODEL else "decode"
    return {name: source_hash(name) for name in (ours, "fa3")}


wildcard_constraints:
    part="[a-z0-9_]+",
    suite="[a-z0-9_]+",
    regime="spaced|sustained",


MEASURE = f"--config {RAW}/config.json --run {RAW}"


rule device:
    input:
        IMAGE,
    output:
        f"{RAW}/device.json",
    log:
        f"{RAW}/logs/device.log",
    resources:
        gpu=1,
    params:
        tool=cmd("attn-profiling", gpu=True),
        hardware=hardware(),
        measuring=config["measuring"],
        fa3_module=config["fa3_module"],
    shell:
        "{params.tool} device {MEASURE} --out {output} 2>&1 | tee {log}"


rule check:
    input:
        f"{RAW}/device.json",
        IMAGE,
    output:
        f"{RAW}/check/{{suite}}.json",
    log:
        f"{RAW}/logs/check.{{suite}}.log",
    resources:
        gpu=1,
    params:
        tool=cmd("attn-profiling", gpu=True),
        kernels=kernels("check"),
        problems=problems,
        measuring=config["measuring"],
        fa3_module=config["fa3_module"],
    shell:
        "{params.tool} check {MEASURE} --suite {wildcards.suite} --out {output} 2>&1 | tee {log}"


rule time:
    input:
        checks,
        lambda wildcards: timed([wildcards.suite] if wildcards.regime == "sustained" else []),
        IMAGE,
    output:
        f"{RAW}/timing/{{suite}}.{{regime}}.json",
    log:
        f"{RAW}/logs/timing.{{suite}}.{{regime}}.log",
    resources:
        gpu=1,
    params:
        tool=cmd("attn-profiling", gpu=True),
        kernels=kernels(None),
        problems=problems,
        measuring=config["measuring"],
        fa3_module=config["fa3_module"],
    shell:
        "{params.tool} time {MEASURE} --suite {wildcards.suite} --regime {wildcards.regime} --out {output}"
        " 2>&1 | tee {log}"


rule host:
    input:
        checks,
        lambda wildcards: timed([wildcards.suite]),
        IMAGE,
    output:
        f"{RAW}/host/{{suite}}.json",
    log:
        f"{RAW}/logs/host.{{suite}}.log",
    resources:
        gpu=1,
    params:
        tool=cmd("attn-profiling", gpu=True),
        kernels=kernels("host"),
        entries={name: entry_hash(name) for name in ENTRIES},
        problems=problems,
        measuring=config["measuring"],
        fa3_module=config["fa3_module"],
    shell:
        "{params.tool} host {MEASURE} --suite {wildcards.suite} --out {output} 2>&1 | tee {log}"


rule profile:
    input:
        checks,
        lambda wildcards: timed(sharing(wildcards.suite)),
        IMAGE,
    output:
        f"{RAW}/ncu/{{suite}}.json",
    log:
        f"{RAW}/logs/ncu.{{suite}}.log",
    resources:
        gpu=1,
    params:
        tool=cmd("attn-profiling", gpu=True, counters=True),
        kernels=kernels("profile"),
        problems=profiled,
        measuring=config["measuring"],
        fa3_module=config["fa3_module"],
    shell:
        "{params.tool} profile {MEASURE} --suite {wildcards.suite} --out {output} 2>&1 | tee {log}"


rule serving:
    input:
        f"{RAW}/device.json",
        IMAGE,
    output:
        f"{RAW}/serving/{{part}}.json",
    log:
        f"{RAW}/logs/serving.{{part}}.log",
    resources:
        gpu=1,
    params:
        tool=cmd("attn-profiling", gpu=True),
        kernels=served,
        problems=lambda wildcards: [str(p) for p in PLAN.problems.get(wildcards.part, ())],
        model=lambda wildcards: config["model"] if wildcards.part == MODEL else None,
        measuring=config["measuring"],
        fa3_module=config["fa3_module"],
    shell:
        "{params.tool} serving {MEASURE} --part {wildcards.part} --out {output} 2>&1 | tee {log}"
