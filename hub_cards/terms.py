"""What each licence asks of a work made from it, as a table; see `licences` for how it is used.

As coarse as a refusal needs.
"""

# What a licence asks of the licence of a work made from it:
#   free         nothing but notices and credit
#   same         the same licence, or one of LATER
#   none         that no such work is published
#   open         cannot be said: a family of licences, or terms that the identifier does not tell
# `commercial` is False where the licence forbids commercial use. Identifiers:
# huggingface.co/docs/hub/repositories-licenses.
_TABLE = {
    ("free", True): (
        "apache-2.0 mit afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda "
        "cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 "
        "etalab-2.0 isc odc-by openmdw-1.0 openmdw-1.1 postgresql ncsa unlicense zlib pddl apple-ascl lppl-1.3c"
    ),
    ("free", False): "cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0",
    ("same", True): (
        "gpl gpl-2.0 gpl-3.0 agpl-3.0 lgpl lgpl-2.1 lgpl-3.0 lgpl-lr cc-by-sa-3.0 cc-by-sa-4.0 odbl "
        "cdla-sharing-1.0 gfdl mpl-2.0 epl-1.0 epl-2.0 eupl-1.1 eupl-1.2 ms-pl osl-3.0 ofl-1.1 "
        # Licences of models whose terms pass on to whoever receives a model made from theirs.
        "openrail openrail++ bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m "
        "llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 gemma grok2-community"
    ),
    ("same", False): (
        "cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 "
        "h-research intel-research apple-amlr deepfloyd-if-license fair-noncommercial-research-license"
    ),
    ("none", True): "cc-by-nd-4.0",
    ("none", False): "cc-by-nc-nd-3.0 cc-by-nc-nd-4.0",
    ("open", True): "cc unknown other",
}
# Licences of models that the Hub knows as `other` with this `license_name`; their terms pass on.
_NAMED_TABLE = {
    ("same", True): (
        "deepseek deepseek-license qwen tongyi-qianwen nvidia-open-model-license falcon-llm-license "
        "stabilityai-ai-community yi-license jamba-open-model-license health-ai-developer-foundations glm-4 lfm1.0 "
        "tencent-hunyuan-community falcon-180b-license"
    ),
    ("same", False): (
        "qwen-research tongyi-qianwen-research mrl mnpl stabilityai-nc-research-community exaone "
        "flux-1-dev-non-commercial-license"
    ),
}
_LISTED, _NAMED = (
    {name: terms for terms, names in table.items() for name in names.split()} for table in (_TABLE, _NAMED_TABLE)
)
TERMS = {**_NAMED, **_LISTED}
IDENTIFIERS = tuple(_LISTED)  # every value that the Hub takes for `license:`
NAMED = tuple(_NAMED)

# A work under the key may also be passed on under these: section 4b of CC BY-SA 3.0 and the list of compatible
# licences of Creative Commons, section 3 of LGPL 2.1, LGPL 3.0, section 3.3 of MPL 2.0, section 7 of EPL 1.0, the
# appendix of the EUPL. A family of licences does not tell which member was meant, so each of them fits.
LATER = {
    "gpl": "gpl-2.0 gpl-3.0",
    "lgpl": "lgpl-2.1 lgpl-3.0",
    "openrail": "openrail++ bigscience-openrail-m creativeml-openrail-m bigcode-openrail-m",
    "cc-by-sa-3.0": "cc-by-sa-4.0",
    "cc-by-sa-4.0": "gpl-3.0",
    "cc-by-nc-sa-2.0": "cc-by-nc-sa-3.0 cc-by-nc-sa-4.0",
    "cc-by-nc-sa-3.0": "cc-by-nc-sa-4.0",
    "lgpl-2.1": "gpl-2.0 gpl-3.0",
    "lgpl-3.0": "gpl-3.0",
    "mpl-2.0": "gpl-2.0 gpl-3.0 lgpl-2.1 lgpl-3.0 agpl-3.0",
    "epl-1.0": "epl-2.0",
    "eupl-1.1": "eupl-1.2 gpl-2.0 osl-3.0 epl-1.0",
    "eupl-1.2": "gpl-2.0 gpl-3.0 agpl-3.0 lgpl-2.1 lgpl-3.0 mpl-2.0 epl-1.0 osl-3.0 cc-by-sa-3.0",
}
