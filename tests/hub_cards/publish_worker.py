"""A rank that publishes a run twice: the first time the Hub refuses the commit."""

import os
import sys

import torch.distributed as dist

from hub_cards import publish


def main() -> None:
    dist.init_process_group("gloo")
    run_dir, repo_id = sys.argv[1:]
    rank = os.environ["RANK"]
    try:
        publish(run_dir, repo_id, license="mit")
    except RuntimeError as error:
        print(f"rank {rank} failed: {type(error).__name__} {error}", flush=True)
    print(f"rank {rank} published {publish(run_dir, repo_id, license='mit').commit}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
