"""The container's health check: exit 0 when the model can answer, 1 with the reason when it cannot."""

import sys

from entrypoint import own_service
from src.serving.management import check_ready


def main() -> int:
    try:
        print(f"READY workers: {check_ready(own_service())}")
    except (RuntimeError, ValueError, OSError) as error:  # NotReady, TokenError and CertificateError are among them
        print(f"not ready: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
