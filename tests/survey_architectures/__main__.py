"""Groups every architecture of the installed transformers and timm, and writes what came out.

`python -m tests.survey_architectures` writes `survey.json` and `survey.md` beside this file. On two cores it takes
about as long as the last line of the table says. Names of model types limit it to these and print instead.
"""

import json
import os
import sys

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

from tests.survey_architectures import records, report

if __name__ == "__main__":
    if sys.argv[1:]:
        for name in sys.argv[1:]:
            print(json.dumps(records.backbone(name), indent=1))
    else:
        report.write(records.survey())
