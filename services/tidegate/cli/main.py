"""The command `tidegate`. Commands import what they need when they run, so that each answers at once."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

import tidegate
from tidegate.cli import talk


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(tidegate.__version__, "-V", "--version", message="tidegate %(version)s")
def cli() -> None:
    """Serves large language models from Triton behind Envoy, and talks to them.

    State is in the folder .tidegate here, or where TIDEGATE_HOME says.
    """


@cli.command()
@click.option("--replicas", type=int, help="Model services, each with a Triton of its own. [default: 1]")
@click.option("--schedulers", type=int, help="Schedulers that decide at once and share nothing. [default: 1]")
@click.option("--model", "model_path", help="A GGUF file or a Hugging Face folder. [default: SmolLM2-135M-Instruct]")
@click.option("--model-name", help="The id that clients ask for. [default: smollm2-135m-instruct]")
@click.option("--lite-model", "lite_model_path", help="A smaller model, for what the other has no time for.")
@click.option("--lite-model-name", help="The id that clients ask for it by. [default: lite]")
@click.option("--lite-replicas", type=int, help="Its model services. [default: 1]")
@click.option("--lite-prompt-tokens", "lite_prompt_token_limit", type=int,
              help="Prompts of at most so many tokens go there first. [default: 0, none]")  # fmt: skip
@click.option("--engine", type=click.Choice(["llm", "llm_sim"]), help="llm_sim only takes time. [default: llm]")
@click.option("--sim-preset", metavar="NAME", help="What llm_sim imitates: h200-8b, h200-70b, smollm2-cpu.")
@click.option("--host", help="Where the ingress listens; all else stays on loopback. [default: 127.0.0.1]")
@click.option("--port", type=int, help="The ingress's port. [default: 8080]")
@click.option(
    "--port-of", "port_pairs", multiple=True, metavar="NAME=PORT", help="Moves another port, e.g. admin=9902."
)
@click.option("--ports", "port_choice", type=click.Choice(["default", "auto"]), default="default",
              help="auto: free ports for everything that is not given; run/mesh.json says which.")  # fmt: skip
@click.option("--api-keys", "api_keys_file", help="A YAML file of API keys and their tenants. [default: no keys]")
@click.option("--no-api-keys", is_flag=True, default=None, help="With --host: lets everybody in who reaches it.")
@click.option("--threads", "thread_count", type=int, help="Threads of each engine. [default: processors / replicas]")
@click.option("--max-sequences", type=int, help="Answers that each engine generates at once.")
@click.option(
    "--start-timeout", "start_timeout_seconds", type=float, help="Seconds until the first answer. [default: 300]"
)
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]))
def up(port_pairs: tuple[str, ...], port_choice: str, **flags: Any) -> None:
    """Starts a whole mesh here and runs it until Ctrl-C.

    Each flag's default can be set with TIDEGATE_UP_<NAME> or in the section `up` of the file TIDEGATE_CONFIG.
    """
    # Processes are started from here, and grpc, which reads this when it is imported, must not meddle with that.
    os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"
    from tidegate.cli import config, ports
    from tidegate.cli import up as command
    from tidegate.common.settings import SettingsError

    try:
        settings = config.load(**flags)
        given = ports.parse_given(port_pairs)
    except (SettingsError, ports.PortError) as error:
        talk.fail(str(error))
        sys.exit(talk.EXIT_USAGE)
    faults = config.usage_faults(settings)
    if faults:
        talk.fail("\n".join(faults))
        sys.exit(talk.EXIT_USAGE)
    sys.exit(command.run(settings, given_ports=given, auto_ports=port_choice == "auto"))


@cli.command()
@click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table")
def status(output: str) -> None:
    """Shows the mesh that runs here: processes, replicas, queues, credits, and what is wrong."""
    from tidegate.cli import status as command

    sys.exit(command.run(output))


@cli.command()
@click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table")
def doctor(output: str) -> None:
    """Checks the machine, the environments, the ports, the model and the mesh, if one runs."""
    from tidegate.cli import config
    from tidegate.cli import doctor as command
    from tidegate.common.settings import SettingsError

    try:
        settings = config.load()
    except SettingsError as error:
        talk.fail(str(error))
        sys.exit(talk.EXIT_USAGE)
    sys.exit(command.run(settings, output))


@cli.command()
@click.argument("prompt", required=False)
@click.option("--address", help="host:port of an ingress. [default: the mesh that runs here, else 127.0.0.1:8080]")
@click.option("--model", default="", help="The model's id. [default: the mesh's]")
@click.option("--system", default="", help="A system message.")
@click.option("--max-tokens", type=click.IntRange(min=1), help="The most tokens of an answer.")
@click.option("--temperature", type=click.FloatRange(0, 2), help="0 is greedy. [default: 1]")
@click.option("--seed", type=int, help="The same seed and request give the same answer.")
def chat(prompt: str | None, address: str | None, model: str, system: str, max_tokens: int | None,
         temperature: float | None, seed: int | None) -> None:  # fmt: skip
    """Talks to the model. With PROMPT, or when input is not a terminal, asks once and prints the answer.

    Ctrl-C ends the answer, Ctrl-D the chat. OPENAI_API_KEY is sent where it is set.
    """
    from tidegate.cli import chat as command

    options = command.Options(
        address=address or command.default_address(),
        api_key=os.environ.get("OPENAI_API_KEY") or None,
        model=model,
        system=system,
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
    )
    sys.exit(command.run(options, prompt))


@cli.command()
@click.option("--scenario", default="custom", help="flood, fairness, batch-storm, retry-storm, square, long-tail, "
              "soak; or custom, by --rate and the flags below. [default: custom]")  # fmt: skip
@click.option("--address", default="", help="host:port of a running ingress. [default: a mesh of its own]")
@click.option("--compare", multiple=True, metavar="NAME=ADDRESS", help="The same load on another target, side by side. "
              "With a mesh of its own, ADDRESS may be the name of one of its ports; and `plain` alone is the same "
              "replicas behind an Envoy that only takes turns, which a flood is compared with unless it is `nothing`."
              )  # fmt: skip
@click.option("--protocol", type=click.Choice(["grpc", "grpc-web", "http"]), default="grpc-web",
              help="grpc-web is gRPC over HTTP/1.1, a fifth of the CPU time. [default: grpc-web]")  # fmt: skip
@click.option("--replicas", type=click.IntRange(min=1), default=2, help="Of the mesh of its own. [default: 2]")
@click.option("--engine", default="llm_sim", help="Of the mesh of its own. [default: llm_sim]")
@click.option("--model", default="", help="The model's id. [default: the mesh's]")
@click.option("--api-keys", "api_keys_file", default="", help="A YAML file of API keys and their tenants.")
@click.option("--capacity", type=click.FloatRange(min=0, min_open=True), help="C in requests/s; else it is measured.")
@click.option("--rate", type=click.FloatRange(min=0), help="Custom: requests/s.")
@click.option("--arrivals", type=click.Choice(["poisson", "constant", "bursts", "square", "closed"]), default="poisson")
@click.option("--users", type=click.IntRange(min=1), help="Custom: a closed loop of so many users.")
@click.option("--think", type=click.FloatRange(min=0), default=0.0, help="Seconds that a user thinks, on average.")
@click.option(
    "--trace", type=click.Path(exists=True, dir_okay=False), help="Custom: a trace in Azure's or Mooncake's form."
)
@click.option(
    "--duration", type=click.FloatRange(min=0, min_open=True), help="Seconds. [default: the scenario's, or 30]"
)
@click.option("--tenants", default="", metavar="A=1,B=3", help="Custom: tenants and their weights.")
@click.option("--class", "service_class", type=click.Choice(["realtime", "standard", "batch"]), default="standard")
@click.option("--prompt-tokens", metavar="LENGTHS", help="N, uniform:LOW,HIGH or lognormal:MEDIAN,SIGMA,MOST.")
@click.option("--answer-tokens", metavar="LENGTHS", help="The same, for answers.")
@click.option("--deadline", type=click.FloatRange(min=0, min_open=True), default=10.0, help="Seconds. [default: 10]")
@click.option("--retries", type=click.Choice(["none", "naive", "obedient"]), default="none")
@click.option("--leave", type=click.FloatRange(0, 1), default=0.0, help="The share of clients that leave early.")
@click.option("--workers", type=click.IntRange(1, 64), default=1, help="Processes that generate. [default: 1]")
@click.option("--seed", type=int, default=1, help="The same seed gives the same load. [default: 1]")
@click.option("--fail-under-goodput", type=click.FloatRange(0, 1), help="Exit 99 when a smaller share is in time.")
@click.option("--json", "json_path", default="", help="Writes the figures to a file.")
@click.option("--report", "report_path", help="Writes the page with pictures. [default: bench-SCENARIO.html]")
@click.option("--ledger", "ledger_path", default="", help="Writes every request's record (MessagePack).")
@click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table")
def bench(**flags: Any) -> None:
    """Puts a load on a mesh and shows, in a table and a page with pictures, what became of it.

    Rates of scenarios are multiples of the capacity C, which is measured first. Without --address a mesh is started
    for it, and ended afterwards.
    """
    os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"
    from tidegate.bench.arrivals import PlanError
    from tidegate.cli import bench as command
    from tidegate.cli import bench_flags

    try:
        options = bench_flags.options(**flags)
    except PlanError as error:
        talk.fail(str(error))
        sys.exit(talk.EXIT_USAGE)
    sys.exit(command.run_command(options))


@cli.group()
@click.option("--model", default="", help="A GGUF file or a Hugging Face folder. [default: SmolLM2-135M-Instruct]")
@click.option(
    "--dtype",
    type=click.Choice(["fp32", "bf16", "fp16", "int8", "w8a8"]),
    default="fp32",
    help="Of the weights. [default: fp32]",
)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", help="[default: cpu]")
@click.option("--threads", type=click.IntRange(1, 1024), default=2, help="Of each rank. [default: 2]")
@click.option("--tensor-parallel-size", "ranks", type=click.IntRange(1, 1024), default=1,
              help="Processes that the model is divided among. [default: 1]")  # fmt: skip
@click.option("--node-count", type=click.IntRange(1, 1024), help="Hosts with as many of them each. [default: 1]")
@click.option("--node-rank", type=click.IntRange(0, 1023), help="Which host this is; 0 has the engine. [default: 0]")
@click.option("--master-address", help="Of host 0, for all hosts. [default: 127.0.0.1]")
@click.option("--master-port", type=click.IntRange(1, 65535), help="Of host 0; with several hosts it must be given.")
@click.pass_context
def engine(context: click.Context, /, **flags: Any) -> None:
    """Drives the engine alone, without Triton or a mesh, to compare and to debug."""
    from tidegate.cli import engine as command

    context.obj = command.Options(**flags)


@engine.command()
@click.argument("prompt", required=False)
@click.option("--max-tokens", type=click.IntRange(min=1), default=64, help="Of the answer. [default: 64]")
@click.option("--temperature", type=click.FloatRange(0, 2), default=0.0, help="0 is greedy. [default: 0]")
@click.option("--seed", type=int, help="The same seed gives the same text.")
@click.pass_obj
def generate(options: Any, /, prompt: str | None, **flags: Any) -> None:
    """Continues PROMPT, or what comes on standard input, as it stands: no chat template is put around it."""
    from tidegate.cli import engine as command

    text = talk.standard_input() if prompt is None else prompt
    _of_engine(lambda: command.generate(options, text, **flags))


@engine.command("bench")
@click.option("--sequences", type=click.IntRange(1, 4096), default=32, help="At once. [default: 32]")
@click.option("--tokens", type=click.IntRange(min=1), default=128, help="Of each answer. [default: 128]")
@click.option("--prompt-tokens", type=click.IntRange(min=1), default=64, help="Of each prompt. [default: 64]")
@click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table")
@click.pass_obj
def engine_bench(options: Any, /, **flags: Any) -> None:
    """Measures tokens per second, of prompts and of answers."""
    from tidegate.cli import engine as command

    _of_engine(lambda: command.bench(options, **flags))


@engine.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table")
@click.pass_obj
def perplexity(options: Any, /, file: Path, output: str) -> None:
    """Tells how likely the model holds the text in FILE, in pieces of 1,024 tokens; lower is likelier."""
    from tidegate.cli import engine as command

    _of_engine(lambda: command.perplexity(options, file, output))


@engine.command(context_settings={"ignore_unknown_options": True})
@click.argument("given", nargs=-1, type=click.UNPROCESSED)
@click.pass_obj
def join(options: Any, /, given: tuple[str, ...]) -> None:
    """Computes with the engine on host 0, one of Triton's too, until that ends.

    GIVEN are further flags of the engine, as --kv-cache-bytes: what both hosts must have alike, both are told.
    """
    from tidegate.cli import engine as command

    _of_engine(lambda: command.join(options, given))


def _of_engine(run: Callable[[], int]) -> None:
    from tidegate.cli import engine as command
    from tidegate.common.settings import SettingsError

    try:
        sys.exit(run())
    except command.EngineFailed:
        sys.exit(talk.EXIT_FAILED)
    except SettingsError as error:
        talk.fail(str(error))
        sys.exit(talk.EXIT_USAGE)


def main() -> None:
    """The console script: usage errors are click's (exit 2), an interrupt is 130, and no mistake is a traceback."""
    try:
        cli.main(standalone_mode=False)
    except click.exceptions.Abort:
        sys.exit(talk.EXIT_INTERRUPTED)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(talk.EXIT_INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(talk.EXIT_FAILED)


if __name__ == "__main__":
    main()
