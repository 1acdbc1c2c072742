"""What a process of the fixture `gang` runs, with the globals `connection`, `store`, `rank` and `job`."""

import traceback

import torch
import torch.distributed as dist
from ray import cloudpickle

from asyncrl.models.ranks import join

torch.set_num_threads(1)
try:
    layouts, count, function, arguments = cloudpickle.loads(job)  # noqa: F821
    ranks = join(dist.FileStore(store, count), rank, layouts, device="cpu", timeout_s=60)  # noqa: F821
    connection.send_bytes(cloudpickle.dumps((function(ranks, *arguments), "")))  # noqa: F821
    dist.destroy_process_group()
except BaseException:
    connection.send_bytes(cloudpickle.dumps((None, traceback.format_exc())))  # noqa: F821
