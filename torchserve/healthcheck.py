"""The container's health check: exit 0 when the model can answer, 1 with the reason when it cannot.

Lies beside the Dockerfile because its build sees this folder alone; needs only the standard library.
``/ping`` does not tell: TorchServe says Healthy while workers still load, and with no model at all.
"""

import json
import os
import ssl
import sys
import urllib.request
from pathlib import Path

ADDRESS = "127.0.0.1:8081/models/fashion_mnist"
KEYS = Path("key_file.json")  # TorchServe writes it into the current folder when it asks for tokens


def main() -> int:
    certificate = os.environ.get("TORCHSERVE_CERTIFICATE")  # run_torchserve.sh --secure sets it; the server's own
    url, trust = f"http{'s' if certificate else ''}://{ADDRESS}", None
    try:
        if certificate:
            trust = ssl.create_default_context(cafile=certificate)
            trust.check_hostname = False  # the certificate itself is what is compared
            trust.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        # The address is a constant.
        request = urllib.request.Request(url)  # noqa: S310
        if KEYS.exists():
            request.add_header("Authorization", f"Bearer {json.loads(KEYS.read_text())['management']['key']}")
        with urllib.request.urlopen(request, timeout=4, context=trust) as answer:  # noqa: S310
            model = json.load(answer)[0]
    except (OSError, ValueError) as error:
        print(f"not ready: {url}: {error}")
        return 1
    ready = sum(worker["status"] == "READY" for worker in model["workers"])
    wanted = max(1, model["minWorkers"])
    print(f"{ready} workers READY, at least {wanted} wanted")
    return 0 if ready >= wanted else 1


if __name__ == "__main__":
    sys.exit(main())
