#!/usr/bin/env python3
"""Carries out the Dockerfile's steps for the CPU image in clean roots, without a container engine, and starts it.

    debootstrap --variant=minbase --include=ca-certificates bookworm ROOT
    sudo scripts/check_image.py ROOT WORK

ROOT stands for the base image and is copied, never changed; WORK is an empty folder for the stages. Settings of pip
and uv in the environment (PIP_…, UV_…, SSL_CERT_FILE) reach the steps, and `--bind FOLDER` shows them a folder. The
server runs on `--port` of the loopback address, as the image's user, with a read-only root.

What this does not show: layers, caches, the image's size, and anything of the CUDA image.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

CONTEXT = Path(__file__).resolve().parents[1]
TARGET = "cpu"
START_LIMIT_S = 900
PASSED_ON = ("PIP_", "UV_", "SSL_CERT_FILE")
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass
class Stage:
    """One FROM of the Dockerfile and what the container would be started with."""

    root: Path
    environment: dict[str, str] = field(default_factory=lambda: {"PATH": PATH, "HOME": "/root"})
    workdir: str = "/"
    user: int = 0
    settings: dict[str, list[str]] = field(default_factory=dict)

    def run(self, command: list[str], binds: list[str], user: int = 0) -> subprocess.Popen[bytes]:
        """Starts a command inside, with /proc, /sys, /dev and the given folders. A user other than root finds all
        read-only but the working directory and /tmp, as compose.yaml and the manifests have it."""
        root = self.root
        mounts = [f"mount --bind {root} {root}", f"mount -t proc proc {root}/proc"]
        for place in ("/dev", "/sys", *binds):
            mounts += [f"mkdir -p {root}{place}", f"mount --rbind {place} {root}{place}"]
        enter = f"chroot {root}"
        if user:
            home = f"{root}{self.workdir}"
            mounts += [f"mount --bind {home} {home}", f"mount -t tmpfs tmpfs {root}/tmp"]
            mounts += [f"mount -o remount,bind,ro {root} {root}"]
            enter += f" setpriv --reuid {user} --regid {user} --clear-groups --no-new-privs --inh-caps=-all"
        inside = f"cd {self.workdir} && exec {shlex.join(command)}"
        script = " && ".join([*mounts, f"exec {enter} sh -c {shlex.quote(inside)}"])
        passed = {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)}
        tied = ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--pid", "--fork", "--kill-child"]
        return subprocess.Popen([*tied, "sh", "-ec", script], env={**self.environment, **passed})


def instructions(dockerfile: str) -> list[tuple[str, str]]:
    """Name and argument of each instruction, continued lines joined, comments left out."""
    lines = [line for line in dockerfile.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    found = (line.split(None, 1) for line in joined.splitlines() if line.strip())
    return [(name, rest.strip()) for name, rest in found]


def allowed_in_context(path: str) -> bool:
    """Whether .dockerignore sends a path: the last pattern that matches it, or a folder above it, decides."""
    decided = True
    for pattern in (CONTEXT / ".dockerignore").read_text().splitlines():
        if pattern and not pattern.startswith("#"):
            plain = re.escape(pattern.removeprefix("!")).replace(r"\*\*/", "(.*/)?").replace(r"\*", "[^/]*")
            if re.match(f"{plain}(/|$)", path):
                decided = pattern.startswith("!")
    return decided


def copy(argument: str, stage: Stage, stages: dict[str, Stage]) -> None:
    """COPY, from the context or another stage."""
    *flags, rest = re.match(r"((?:--\S+\s+)*)(.*)", argument).groups()  # type: ignore[union-attr]
    *sources, target = rest.split()
    base = next((stages[f.removeprefix("--from=").strip()].root for f in flags if f.strip()), None)
    place = stage.root / (target if target.startswith("/") else f"{stage.workdir}/{target}").lstrip("/")
    for source in sources:
        origin = CONTEXT / source if base is None else base / source.lstrip("/")
        if base is None and not allowed_in_context(source):
            sys.exit(f"COPY {source}: .dockerignore keeps it out")
        if origin.is_dir():
            shutil.copytree(origin, place, symlinks=True, dirs_exist_ok=True, ignore=_ignored if base is None else None)
        else:
            folder = place if target.endswith("/") else place.parent
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy2(origin, place)


def _ignored(folder: str, names: list[str]) -> list[str]:
    inside = Path(folder).relative_to(CONTEXT)
    return [name for name in names if not allowed_in_context(str(inside / name))]


def build(base: Path, work: Path, binds: list[str], build_args: dict[str, str]) -> Stage:
    """Every stage that is not built on an image of somebody else's, in order; returns the target."""
    stages: dict[str, Stage] = {}
    stage: Stage | None = None
    for name, argument in instructions((CONTEXT / "Dockerfile").read_text()):
        if name == "FROM":
            parent, _, label = argument.split()
            if parent not in stages and stages:
                stage = None
                continue
            print(f"== FROM {argument}", flush=True)
            above = stages.get(parent)
            subprocess.run(["cp", "-a", "--reflink=auto", above.root if above else base, work / label], check=True)
            stage = Stage(work / label, dict(above.environment), above.workdir) if above else Stage(work / label)
            shutil.copy2("/etc/resolv.conf", stage.root / "etc/resolv.conf")
            stages[label] = stage
        elif stage is not None:
            print(f"-- {name} {argument}", flush=True)
            carry_out(name, argument, stage, stages, binds)
            if name == "ARG":
                stage.environment.update({k: v for k, v in build_args.items() if k in stage.environment})
    return stages[TARGET]


def carry_out(name: str, argument: str, stage: Stage, stages: dict[str, Stage], binds: list[str]) -> None:
    """One instruction of a stage."""
    if name in ("ENV", "ARG"):
        for pair in shlex.split(argument):
            key, value = pair.split("=", 1)
            stage.environment[key] = re.sub(r"\$(\w+)", lambda m: stage.environment[m[1]], value)
    elif name == "WORKDIR":
        stage.workdir = argument
        (stage.root / argument.lstrip("/")).mkdir(parents=True, exist_ok=True)
    elif name == "COPY":
        copy(argument, stage, stages)
    elif name == "RUN":
        command = re.sub(r"^(--\S+\s+)*", "", argument)
        if stage.run(["sh", "-c", command], binds).wait() != 0:
            sys.exit(f"failed: RUN {command}")
    elif name == "USER":
        stage.user = int(argument)
    elif name in ("HEALTHCHECK", "ENTRYPOINT", "CMD"):
        stage.settings[name] = json.loads(argument[argument.index("[") :])


def serve(stage: Stage, binds: list[str], port: int) -> None:
    """Starts the image as its user, waits for its health check, asks for one guided answer, and stops it."""
    here = ["--host", "127.0.0.1", "--port", str(port)]
    health = [sys.executable, "-c", stage.settings["HEALTHCHECK"][-1].replace(":8000", f":{port}")]
    server = stage.run(stage.settings["ENTRYPOINT"] + stage.settings["CMD"] + here, binds, stage.user)
    began = time.monotonic()
    while subprocess.run(health, stderr=subprocess.DEVNULL, check=False).returncode != 0:
        if server.poll() is not None or time.monotonic() - began > START_LIMIT_S:
            sys.exit("the server did not become healthy")
        time.sleep(1)
    print(f"== healthy after {time.monotonic() - began:.0f} s", flush=True)
    guidance = {"method": "pargs", "reward_model": "helpful", "beta": 2.0}
    body = {"model": "demo", "prompt": "Customer: Hi\nAgent:", "max_tokens": 16, "guidance": guidance}
    ask = f"""import urllib.request as u; print(u.urlopen(u.Request("http://127.0.0.1:{port}/v1/completions",
        {json.dumps(body)!r}.encode(), {{"Content-Type": "application/json"}})).read().decode())"""
    if stage.run(["python3", "-c", ask], binds, stage.user).wait() != 0:
        sys.exit("no guided answer")
    children = f"/proc/{server.pid}/task/{server.pid}/children"
    os.kill(int(Path(children).read_text().split()[0]), signal.SIGTERM)
    print(f"== stopped with {server.wait(timeout=120)} after SIGTERM", flush=True)


def main() -> None:
    """Builds and serves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--bind", action="append", default=[], help="a folder of this machine that the steps see")
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE", help="as for docker build")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    build_args = dict(pair.split("=", 1) for pair in args.build_arg)
    serve(build(args.root.resolve(), args.work.resolve(), args.bind, build_args), args.bind, args.port)


if __name__ == "__main__":
    main()
