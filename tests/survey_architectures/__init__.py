"""How well `group_layers` reads every architecture that is installed."""

from tests import timm_beside

timm_beside.make_importable()
