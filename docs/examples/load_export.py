"""Classify an image with what `pfed-client export FILE` wrote: python load_export.py FILE IMAGE"""

import sys
from pathlib import Path

from PIL import Image

from pfed_client.classifier import Classifier

if len(sys.argv) != 3:
    sys.exit("give the exported file and an image: python load_export.py FILE IMAGE")
classifier = Classifier.from_export(Path(sys.argv[1]))
features = classifier.features([Image.open(sys.argv[2]).convert("RGB")])
probabilities = classifier.probabilities(features)[0]
for name, probability in zip(classifier.plan.class_names, probabilities.tolist(), strict=True):
    print(f"{name}: {100 * probability:.1f} %")
