"""The last thing that the server of `forked.py` imports: what every training would otherwise do again, done once."""

import gc
import sys

import torch
import torch.utils.serialization
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from tests.families import FAMILIES
from tests.soak.draw import PLAIN

torch.set_num_threads(1)
get_checkpoint_conversion_mapping("bert")  # builds the table of all models
for name in PLAIN:
    FAMILIES[name].build()  # imports the model's code
assert "transformers.models.clip.modeling_clip" in sys.modules
gc.collect()
gc.freeze()  # no fork looks through these objects, or copies their pages by doing so
