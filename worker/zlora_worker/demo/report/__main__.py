"""`python -m zlora_worker.demo.report`."""

from zlora_worker.demo.report.report import main

main()
