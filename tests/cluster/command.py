"""`python tests/cluster up|down|run|kubeconfig|build`: the test cluster by hand."""

from __future__ import annotations

import argparse
import os
import subprocess

from cluster import builds
from cluster.choice import a_cluster


def main() -> int:
    parser = argparse.ArgumentParser(prog="python tests/cluster", description="The test cluster by hand.")
    commands = parser.add_subparsers(dest="command", required=True)
    names = [program.name for program in builds.OWN]
    build = commands.add_parser("build", help="build the cluster's programs, or only those named, once")
    build.add_argument("programs", nargs="*", default="all", choices=["all", *names])
    commands.add_parser("up", help="bring the cluster up, unless it is")
    commands.add_parser("down", help="take it away")
    commands.add_parser("kubeconfig", help="bring it up and print the path of its kubeconfig")
    run = commands.add_parser("run", help="bring it up and run a command, or a shell, where it is reached")
    run.add_argument("rest", nargs=argparse.REMAINDER, metavar="command")
    asked = parser.parse_args()

    cluster = a_cluster()
    match asked.command:
        case "build":
            for program in builds.OWN:
                if "all" in asked.programs or program.name in asked.programs:
                    builds.built(program)
        case "up":
            cluster.up()
        case "down":
            cluster.down()
        case "kubeconfig":
            cluster.up()
            print(cluster.kubeconfig)
        case "run":
            cluster.up()
            environment = {**os.environ, "KUBECONFIG": str(cluster.kubeconfig)}
            tools = [builds.built(builds.COMPONENTS), builds.built(builds.HELM)]
            environment["PATH"] = os.pathsep.join([*map(str, tools), os.environ["PATH"]])
            command = asked.rest or [os.environ.get("SHELL", "/bin/sh")]
            return subprocess.run(cluster.enter(*command), env=environment, check=False).returncode
    return 0
