# From the raw files to the paper, without a GPU: tidy tables, verdicts, LaTeX, notebook, report, PDF.
from attn_ladder.stage import subjects

from attn_profiling.replication import home
from attn_profiling.sources import ENTRIES, SERVING, entry_hash, source_hash

LOGS = "results/logs"
TIDY = expand("results/{name}", name=["metrics.csv", "speedups.csv", "provenance.json"])
EVIDENCE = [
    *TIDY,
    "results/verdicts.csv",
    "results/replications.csv",
    config["problems"],
    config["constraints"],
    *(
        str(Path(config["constraints"]).with_name(f"{name}.csv"))
        for name in ("predictions", "pilot")
    ),
    "profiling/attn_profiling/predict.py",
    "paper/evidence.py",
]
TABLES = expand(
    "paper/generated/{name}.tex",
    name="grid grid_fp16 grid256 grid_stages ladder foretold variants which_fa3 locks published constraints verdicts criteria witnesses stalls host regimes"
    " roofline prediction predictions decode tokens token_differences serving_speed checks replication left_out stages".split(),
)
FIGURES = expand(
    "paper/generated/{name}.pdf",
    name="grid ratio two_clocks prediction branching launch sync memory controls".split(),
)
NUMBERS = "paper/generated/numbers.tex"
RESULTS = [
    *TIDY,
    *TABLES,
    *FIGURES,
    NUMBERS,
    *expand(
        "results/{name}",
        name=["verdicts.csv", "replications.csv", "model.csv", "explore.ipynb", "report.html"],
    ),
]
REPLICATIONS = sorted(str(p) for p in home(config["device"]).glob("**/*.json"))
LOOK_UP = f"--problems {config['problems']} --constraints {config['constraints']}"


rule tidy:
    input:
        PLAN.raw_files,
        config["problems"],
        expand(
            "profiling/attn_profiling/{name}.py",
            name=["addenda", "host_pairs", "metrics", "ncu_rep", "stats", "tidy", "tidy_serving"],
        ),
        IMAGE,
    output:
        TIDY,
    log:
        f"{LOGS}/tidy.log",
    params:
        tool=cmd("attn-profiling"),
        options=f"--raw {RAW} --tier {PLAN.tier} --problems {config['problems']}",
        kernels={name: source_hash(name) for name in (*subjects(), *SERVING)},
        entries={name: entry_hash(name) for name in ENTRIES},
    shell:
        "{params.tool} tidy {params.options} --out-metrics {output[0]} --out-speedups {output[1]}"
        " --out-provenance {output[2]} 2>&1 | tee {log}"


rule verdict:
    input:
        TIDY,
        config["constraints"],
        expand("profiling/attn_profiling/{name}.py", name=["stats", "verdict"]),
        IMAGE,
    output:
        "results/verdicts.csv",
    log:
        f"{LOGS}/verdict.log",
    params:
        tool=cmd("attn-profiling"),
        constraints=config["constraints"],
    shell:
        "{params.tool} verdict --metrics {input[0]} --speedups {input[1]} --provenance {input[2]}"
        " --constraints {params.constraints} --out {output} 2>&1 | tee {log}"


rule replications:
    input:
        PLAN.raw_files,
        REPLICATIONS,
        expand("profiling/attn_profiling/{name}.py", name=["replication", "stats", "verify"]),
        IMAGE,
    output:
        "results/replications.csv",
    log:
        f"{LOGS}/replications.log",
    params:
        tool=cmd("attn-profiling"),
        options=f"--raw {RAW} --device {config['device']}",
        kernels={name: source_hash(name) for name in subjects()},
    shell:
        "{params.tool} replications {params.options} --out {output} 2>&1 | tee {log}"


rule tables:
    input:
        EVIDENCE,
        expand(
            "paper/{name}",
            name=["tables.py", "table.py", "in_use.py", "published.csv", "fa3_builds.csv"],
        ),
        expand("requirements/{name}.txt", name=["base", "cuda"]),
        IMAGE,
    output:
        TABLES,
    log:
        f"{LOGS}/tables.log",
    params:
        python=cmd("python"),
    shell:
        "{params.python} -m paper.tables latex {LOOK_UP} --out paper/generated > {log} 2>&1"


rule model:
    input:
        EVIDENCE,
        "paper/tables.py",
        "profiling/attn_profiling/model.py",
        IMAGE,
    output:
        "results/model.csv",
    log:
        f"{LOGS}/model.log",
    params:
        python=cmd("python"),
    shell:
        "{params.python} -m paper.tables model {LOOK_UP} --out {output} > {log} 2>&1"


rule figures:
    input:
        EVIDENCE,
        "paper/figures.py",
        IMAGE,
    output:
        FIGURES,
    log:
        f"{LOGS}/figures.log",
    params:
        python=cmd("python"),
    shell:
        "{params.python} -m paper.figures {LOOK_UP} --out paper/generated > {log} 2>&1"


rule numbers:
    input:
        EVIDENCE,
        expand("paper/{name}.py", name=["numbers", "in_use", "table"]),
        IMAGE,
    output:
        NUMBERS,
    log:
        f"{LOGS}/numbers.log",
    params:
        python=cmd("python"),
    shell:
        "{params.python} -m paper.numbers {LOOK_UP} --out {output} > {log} 2>&1"


rule notebook:
    input:
        EVIDENCE,
        "paper/notebook.py",
        "notebooks/explore.ipynb",
        IMAGE,
    output:
        "results/explore.ipynb",
    log:
        f"{LOGS}/notebook.log",
    params:
        python=cmd("python"),
    shell:
        "{params.python} -m paper.notebook notebooks/explore.ipynb --out {output} > {log} 2>&1"


rule report:
    input:
        EVIDENCE,
        expand(
            "paper/{name}",
            name="figures.py report.py tables.py table.py in_use.py published.csv fa3_builds.csv".split(),
        ),
        expand("requirements/{name}.txt", name=["base", "cuda"]),
        "paper/templates/report.html.j2",
        IMAGE,
    output:
        "results/report.html",
    log:
        f"{LOGS}/report.log",
    params:
        python=cmd("python"),
    shell:
        "{params.python} -m paper.report {LOOK_UP} --out {output} > {log} 2>&1"


# The dates in the PDF are fixed, so that the same results give the same bytes.
rule pdf:
    input:
        "paper/main.tex",
        "paper/refs.bib",
        TABLES,
        FIGURES,
        NUMBERS,
        IMAGE,
    output:
        "results/main.pdf",
    log:
        f"{LOGS}/pdf.log",
    params:
        latexmk=cmd("env SOURCE_DATE_EPOCH=0 FORCE_SOURCE_DATE=1 latexmk"),
    shell:
        "{params.latexmk} -cd -pdf -interaction=nonstopmode -halt-on-error -outdir=../results/latex paper/main.tex"
        " > {log} 2>&1 && cp results/latex/main.pdf {output}"
