"""Send each request to a small or to a large model, by the difficulty that an estimator's checkpoint sees in it.

  depo route CHECKPOINT --calibrate labelled.jsonl --share 0.3 --out curve
  depo route CHECKPOINT --small http://host:8001 --large http://host:8002 --threshold 0.42

CHECKPOINT is <ckpt.path>/depo/<tag>.safetensors of the run that trained the small model. The estimator and its
settings are those of the run: give the same --depo.* flags. It believes in a pass rate of the small model from the
prompt's text alone. If that is at least the threshold, the request goes to the small model, else to the large one.
docs/routing.md says when this helps.

The first form finds the threshold. Each line of the file has `prompt` (as the policy sees it) or `messages`, and
`small` and `large`, the share of right answers of each model, from 0 to 1. --share is the share of requests for the
large model, --accuracy the accuracy to reach. It writes curve.png and curve.json to --out.

The second form serves /v1/chat/completions and /v1/completions, /v1/models, /health and /metrics (Prometheus), until
it gets SIGTERM or SIGINT; then it finishes the requests that are in progress.
Needs: pip install 'openrlhf-depo[route]'; for --calibrate also openrlhf-depo[report]

Exit status: 0 if done, 1 if a file, model or address cannot be used, 2 if the options are wrong.
"""

import argparse
import contextlib
import logging
import sys
import urllib.parse
from pathlib import Path

from depo_plugin.settings import config

BATCH = 64  # labelled requests from one look at the progress bar to the next
EXTRA = "pip install 'openrlhf-depo[route,report]'"
DRAIN_S = 60  # longest wait for requests in progress, after SIGTERM


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `depo route`, and the --depo.* flags of a launch."""
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="<ckpt.path>/depo/<tag>.safetensors")
    serving = parser.add_argument_group("to serve")
    serving.add_argument("--small", metavar="URL", help="server of the small model")
    serving.add_argument("--large", metavar="URL", help="server of the large model")
    text = "pass rate of the small model from which it gets a request, 0 to 1"
    serving.add_argument("--threshold", type=_share, metavar="T", help=text)
    serving.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    serving.add_argument("--port", type=int, default=8080, help="port to listen on (default: %(default)s)")
    text = "longest silence of a model's server, in seconds (default: %(default)g)"
    serving.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS", help=text)
    finding = parser.add_argument_group("to find the threshold")
    finding.add_argument("--calibrate", type=Path, metavar="FILE", help="JSON lines of labelled requests")
    finding.add_argument("--share", type=_share, metavar="S", help="most requests for the large model, 0 to 1")
    finding.add_argument("--accuracy", type=_share, metavar="A", help="share of right answers to reach, 0 to 1")
    finding.add_argument("--out", type=Path, metavar="DIR", help="folder for curve.png and curve.json")
    text = "model whose chat template makes prompts of messages, if the launch has --data.apply_chat_template"
    parser.add_argument("--tokenizer", metavar="MODEL", help=text)
    config.add_arguments(parser)


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text}: must be from 0 to 1.")
    return value


def run(args: argparse.Namespace) -> int:
    """Run `depo route` and return the exit status."""
    try:
        _check(args)
        cfg = config.load_config(getattr(args, "depo.config"), config.overrides_from_namespace(args))
    except (ValueError, config.ConfigError) as error:
        print(f"depo route: {error}", file=sys.stderr)
        return 2
    try:
        return _calibrate(args, cfg) if args.calibrate else _serve(args, cfg)
    except ModuleNotFoundError as error:
        print(f"depo route: the package {error.name} is missing. Run: {EXTRA}", file=sys.stderr)
    except (OSError, ValueError, RuntimeError) as error:  # of the checkpoint, the encoder, the template, the file
        print(f"depo route: {error}", file=sys.stderr)
    return 1


def _check(args: argparse.Namespace) -> None:
    """Raise ValueError if the options do not fit together."""
    serving = {"--small": args.small, "--large": args.large, "--threshold": args.threshold}
    finding = {"--share": args.share, "--accuracy": args.accuracy, "--out": args.out}
    unused = serving if args.calibrate else finding
    if given := [flag for flag, value in unused.items() if value is not None]:
        other = "with --calibrate nothing is served" if args.calibrate else "needs --calibrate FILE"
        raise ValueError(f"{given[0]}: {other}.")
    if args.calibrate:
        if (args.share is None) == (args.accuracy is None) or not args.out:
            raise ValueError("--calibrate needs --out DIR, and either --share S or --accuracy A.")
        return
    if missing := [flag for flag, value in serving.items() if value is None]:
        raise ValueError(f"{', '.join(missing)}: missing. To find a threshold: --calibrate FILE.")
    for flag in ("--small", "--large"):
        if not _is_address(serving[flag]):
            raise ValueError(f"{flag} {serving[flag]}: must be http://HOST:PORT, with or without /v1.")
    if not 0 <= args.port <= 65535:
        raise ValueError(f"--port {args.port}: must be from 0 to 65535.")
    if not 0 < args.timeout < float("inf"):
        raise ValueError(f"--timeout {args.timeout:g}: must be a finite number above 0.")


def _is_address(text: str) -> bool:
    """Return whether this is the address of a server, with or without /v1."""
    try:
        url = urllib.parse.urlsplit(text)
        port = url.port  # raises ValueError if it is no port
    except ValueError:
        return False
    whole = url.scheme in ("http", "https") and bool(url.hostname) and not (url.query or url.fragment)
    return whole and port != 0 and url.path.rstrip("/") in ("", "/v1")


def _template(args: argparse.Namespace):
    """Return the function that makes a prompt of messages."""
    from depo_plugin.routing import rater

    return rater.chat_template(args.tokenizer) if args.tokenizer else rater.plain_text


def _rater(args: argparse.Namespace, cfg: config.DepoConfig):
    """Load the estimator and return its rater."""
    import torch

    from depo_plugin.estimator.estimator import DifficultyEstimator
    from depo_plugin.routing import rater

    torch.set_num_threads(cfg.estimator.threads or 1)  # one short prompt keeps no more than one busy
    return rater.Rater(DifficultyEstimator.from_checkpoint(args.checkpoint, cfg))


def _calibrate(args: argparse.Namespace, cfg: config.DepoConfig) -> int:
    import numpy as np
    from tqdm import tqdm

    from depo_plugin.routing import curve

    prompts, small_N, large_N = curve.read(args.calibrate, _template(args))  # before the encoder loads
    rater = _rater(args, cfg)
    rates: list[float] = []
    with tqdm(total=len(prompts), unit="prompt", disable=None) as bar:
        for start in range(0, len(prompts), BATCH):
            rates += rater.rates(prompts[start : start + BATCH])
            bar.update(len(rates) - start)
    sample = curve.Sample(np.array(rates), small_N, large_N)
    choice = curve.choose(sample, curve.Target(args.share, args.accuracy), seed=0)
    print("\n".join([*curve.sentences(choice), ""]))
    curve.write(choice, sample, args.out)
    print(args.out / "curve.png")
    return 0


def _serve(args: argparse.Namespace, cfg: config.DepoConfig) -> int:
    import uvicorn

    from depo_plugin.routing import proxy

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it has a line for each request, too
    template = _template(args)
    router = proxy.Router(_rater(args, cfg), args.small, args.large, args.threshold, template, args.timeout)
    server = uvicorn.Server(
        uvicorn.Config(
            proxy.app(router),
            host=args.host,
            port=args.port,
            log_config=None,
            access_log=False,
            date_header=False,  # those of the models' servers are passed on
            server_header=False,
            timeout_graceful_shutdown=DRAIN_S,
        )
    )
    # KeyboardInterrupt: uvicorn raises it again at its end. SystemExit: the port is taken, as uvicorn has said.
    with contextlib.suppress(KeyboardInterrupt, SystemExit):
        server.run()
    return 0 if server.started else 1
