"""One job of the graph: hand it to the `flowrepro reproduce` that waits for it, or do it here (on a cluster)."""
import os
import sys
from multiprocessing.connection import Client


def main(plan: str, name: str, notebook: bool) -> int:
    if address := os.environ.get("FLOWREPRO_WARM"):
        with Client(address, "AF_UNIX") as server:
            server.send((plan, name, notebook))
            return server.recv()
    from flowrepro.reproduce import execute

    return execute(plan, name, notebook)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], "--notebook" in sys.argv))
