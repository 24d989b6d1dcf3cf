"""`python -m tests.soak SECONDS`: a busy Headrace, watched for what grows."""
