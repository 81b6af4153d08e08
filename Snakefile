import sys

from snakemake.exceptions import WorkflowError

from attn_profiling.config import coerced
from attn_profiling.workflow import asked_for, prepare


configfile: "config/config.yaml"


ROOT = Path(workflow.basedir)
config.update(coerced(config, ROOT))
try:
    PLAN = prepare(
        config,
        root=ROOT,
        targets=asked_for(sys.argv[1:]),
        main=workflow.exec_mode.name == "DEFAULT",
        remote=workflow.resource_settings.nodes is not None,
    )
except ValueError as error:
    raise WorkflowError(str(error)) from None


onstart:
    PLAN.start()


onerror:
    PLAN.advise()


RAW = PLAN.raw  # the folder of raw files: runs/<id> or measurements/<device>
cmd = PLAN.cmd  # cmd(tool, gpu=True): how a tool starts, natively or in a container
IMAGE = ancient(PLAN.image)  # an input of every rule that runs a tool


if PLAN.tier == "measure":

    include: "profiling/measure.smk"


include: "paper/paper.smk"


rule all:
    default_target: True
    input:
        RESULTS,
        ["results/main.pdf"] if config["paper"] else [],


rule results:
    input:
        RESULTS,


rule measure:
    input:
        PLAN.raw_files,


rule verify:
    input:
        PLAN.raw_files if PLAN.tier == "measure" else [],
    log:
        "results/logs/verify.log",
    params:
        tool=cmd("attn-profiling"),
        run=f"runs/{config['run']}",
    shell:
        "{params.tool} verify --run {params.run} 2>&1 | tee {log}"


rule container:
    input:
        PLAN.digest_file,


rule image:
    input:
        multiext("docker/", "Dockerfile", "packages.sh"),
        "profiling/attn_profiling/environment.py",
        "pyproject.toml",
        expand("requirements/{name}.txt", name=["base", "cuda", "debian"]),
    output:
        PLAN.digest_file,
    log:
        "results/logs/image.log",
    params:
        build=PLAN.build,
    shell:
        "{params.build} --out {output} > {log} 2>&1"
