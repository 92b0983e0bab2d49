"""What the names of parts say of their place: the words of the architectures, as patterns."""

import re

from torch import nn

# What works below the blocks though it may be registered after them, and what works above though it may come before.
_BELOW = re.compile(
    r"(?<!un)embed(?!ding_(projection|norm)$)|token|position|rel(ative)?_|(^|_)pos_|_pos$|per_layer|^ple$|^altup_proj|"
    r"^pre_?(layer)?norm|post_conv_layernorm|^batch_norm$|^conv2d|^conv_s\d|^compress_vit|^encoder_conv|"
    r"latent_proj|speakers_proj|delta_proj"
)
_ABOVE = re.compile(
    r"unembed|final|^ln_f$|^norm_f$|ln_post|norm_post|post_?(layer)?norm|_out$|^out_|^head|_heads?$|"
    r"classif|pool|logit|predict|decode_|output|neck|fpn|pan_|lateral|temperature|merger|score(?!_token)|quantiz"
)
# Names that say nothing: classes in which such a part works below (True) or above the blocks, against the usual.
_BY_CLASS = (
    ("layer_norm", re.compile(r"StableLayerNorm|Conformer"), False),
    ("layernorm_embedding", re.compile(r"BigBirdPegasus"), False),
    ("norm", re.compile(r"T5Gemma"), False),
    ("layernorm", re.compile(r"Eomt|VideoMT|Videomt"), False),
    ("proj", re.compile(r"CohereAsr"), True),
    ("resnet_head", re.compile(r"UVDoc"), True),
)
# A norm or a convolution of this name works on what was registered just before it.
_FOLLOWS = re.compile(r"^(LayerNorm|conv_out|encoder_norm)$")
# Names that say which of several towers a part serves, and whether from below.
QUERY = re.compile(r"quer(y|ies)|ref(erence)?_?(point|anchor)")
SERVES = (
    (QUERY, re.compile(r"decoder|former|perceiver|resampler"), True),
    (re.compile(r"enc_to_dec"), re.compile(r"decoder"), True),
    (re.compile(r"^level_embed"), re.compile(r"encoder"), True),
    (re.compile(r"^enc(oder)?_(out|score|bbox)"), re.compile(r"encoder"), False),
    (re.compile(r"quantiz"), re.compile(r"decoder"), True),
    (re.compile(r"^no_memory"), re.compile(r"vision"), False),
    (re.compile(r"^post_tile"), re.compile(r"^global"), True),
    (re.compile(r"^layernorm_post$"), re.compile(r"^transformer$"), False),
    (re.compile(r"^temporal_embed"), re.compile(r"^temporal"), True),
    (re.compile(r"^layernorm1$"), re.compile(r"^spatial"), False),
    (re.compile(r"^layernorm2$"), re.compile(r"^temporal"), False),
)
BRIDGE = re.compile(r"proj|connector|adapt|bridge|merger|resampl|align|norm|to_dec")
STEM = re.compile(r"embed|stem|feature_extract|subsampl")
HEAD = re.compile(r"^(lm_head|heads?|head_\w+|classifier|score|fc|fc_out|output_layer|qa_outputs|cls|out)$")
TO_TEXT = re.compile(r"^language_proj")  # leads from another tower to the language model
LAST = re.compile(r"^(x|cross|fusion)_")  # what joins the towers
BARE = re.compile(r"(?!.*(For[A-Z]|Head|WithProjection|MTModel)).*(Model|Backbone|Encoder|Decoder)$")
MODALITIES = {
    "text": re.compile(r"text|language|(^|_)ll?m(_|$)"),
    "vision": re.compile(r"vision|visual|image|video|pixel|vit(_|$)|vpm"),
    "audio": re.compile(r"audio|speech|acoustic"),
    "other": re.compile(r"protein|graph"),
}


def is_below(module: nn.Module, name: str) -> bool:
    """Return whether a part of a module works below its blocks: by its name, as a lookup table, or by its parts."""
    if _BELOW.search(name):
        return True
    child = getattr(module, name)
    if not isinstance(child, nn.Module):
        return False
    if _FOLLOWS.match(name):
        before = [other for other, _ in module.named_children()]
        place = before.index(name)
        return place > 0 and is_below(module, before[place - 1])
    inner = [parameter for parameter, _ in child.named_parameters()]
    tables = any(isinstance(part, nn.Embedding) for part in child.modules())
    return tables or (bool(inner) and all(_BELOW.search(parameter) for parameter in inner))


def sides(module: nn.Module, name: str, *, is_own: bool) -> tuple[bool, bool]:
    """Return whether a part of a module works below its blocks, and whether above; neither where the name is silent.

    Args:
        module: the module.
        name: of a child or a parameter.
        is_own: whether it is a parameter of the module itself.
    """
    for leaf, classes, from_below in _BY_CLASS:
        if leaf == name and classes.search(type(module).__name__):
            return from_below, not from_below
    above = bool(_ABOVE.search(name)) or (is_own and bool(BRIDGE.search(name)))
    return is_below(module, name) and (not above or bool(_FOLLOWS.match(name))), above
