import os

from snakemake.exceptions import WorkflowError

from attn_profiling.workflow import prepare


configfile: "config/config.yaml"


try:
    PLAN = prepare(
        config,
        root=Path(workflow.basedir),
        targets=workflow.dag_settings.targets if workflow.dag_settings else (),
        main=workflow.exec_mode.name == "DEFAULT",
        dry=workflow.dryrun,
    )
except ValueError as error:
    raise WorkflowError(str(error)) from None


RAW = PLAN.raw  # the folder of raw files: runs/<id> or measurements/<device>
cmd = PLAN.cmd  # cmd("attn-profiling", gpu=True): the tool, inside the container if there is one
IMAGE = ancient(PLAN.image)  # an input of every rule that runs a tool


if PLAN.tier == "measure":

    include: "profiling/measure.smk"


include: "paper/paper.smk"


rule all:
    input:
        RESULTS,
        ["results/main.pdf"] if config["paper"] else [],
    default_target: True


rule results:
    input:
        RESULTS,


rule measure:
    input:
        PLAN.raw_files,


rule container:
    input:
        PLAN.digest_file,


rule image:
    input:
        "docker/Dockerfile",
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
