"""Memory and threads after 3,000 and after 10,000 batches."""

import os

import pytest
from harness import run_script

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not os.path.isdir("/proc"), reason="needs /proc"),
]

SOAK = """
import gc, multiprocessing, os, pathlib, sys, threading
import albumentations as A, numpy as np
from kerastrip import PKSampler

def rss(pid):
    pages = pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE") / 1e6

train = PKSampler(
    np.zeros((256, 16, 16, 3), "uint8"), np.arange(256) % 32,
    classes_per_batch=8, samples_per_class=4, batches_per_epoch=1000,
    # OpenCV keeps memory of every thread that ever resized, warped or blurred.
    augment=A.Compose([
        A.RandomCrop(12, 12), A.HorizontalFlip(), A.Resize(16, 16),
        A.Affine(rotate=(-9, 9), p=1), A.GaussianBlur(p=1),
    ]),
    workers=2, use_multiprocessing=sys.argv[1] == "processes",
)
for epoch in range(10):
    train.set_epoch(epoch)
    for step in range(1000):
        train[step]
    if epoch in (2, 9):  # caches are full by then
        gc.collect()
        pids = sorted(child.pid for child in multiprocessing.active_children())
        memory = [rss(pid) for pid in (os.getpid(), *pids)]
        print(threading.active_count(), *memory, flush=True)
"""


@pytest.mark.parametrize("mode", ["threads", "processes"])
def test_ten_thousand_batches_do_not_grow_memory(mode):
    done = run_script(SOAK, mode, timeout=1200)
    early, late = (
        [float(word) for word in line.split()] for line in done.stdout.splitlines()
    )
    assert len(early) == len(late) == (4 if mode == "processes" else 2)
    assert late[0] <= 4  # threads: those that are ahead, and no more
    # 7,000 batches are 172 MB of images: one in forty that were kept would show.
    for before, after in zip(early[1:], late[1:], strict=True):
        assert after - before < 4, (early, late)
