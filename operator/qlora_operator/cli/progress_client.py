"""Reads rank 0's progress from its port on this machine."""

import http.client

from qlora_contract.progress import ProgressReport

TIMEOUT_SECONDS = 1.0
MAX_REPORT_BYTES = 1 << 20


def fetch_progress(port: int, job_uid: str, attempt: int) -> ProgressReport | None:
    """Rank 0's newest report; None while it serves none, or when another program answers at the port."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_SECONDS)
    try:
        connection.request("GET", "/progress")
        answer = connection.getresponse()
        report = ProgressReport.model_validate_json(answer.read(MAX_REPORT_BYTES))
    except (OSError, http.client.HTTPException, ValueError):
        return None
    finally:
        connection.close()
    return report if (report.job_uid, report.attempt) == (job_uid, attempt) else None
