"""report.html: what a job did, for people, in one file that needs no network. Nothing here needs torch."""
