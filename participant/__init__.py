"""The participant daemon of one site. Torch is imported in training, dp_sgd, data and evaluation only."""

import logging
import sys

# Where bitsandbytes is installed, PEFT imports it for every model; on a CPU with AVX-512 BF16 it then asks the package
# kernels for compiled code off a model hub, and warns where there is none. Nothing is fetched here, nor run unseen.
sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]  # importing it raises ImportError from here on
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
