"""Policies: networks that can be trained. diffusers and transformers are imported here and nowhere else."""

import logging

# diffusers imports image processors that flowrl never uses, and transformers warns for each that torchvision, an extra, is missing
logging.getLogger("transformers.utils.import_utils").addFilter(lambda record: "requires torchvision" not in record.getMessage())
