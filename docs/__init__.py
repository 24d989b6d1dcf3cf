"""What is written about Headrace; the reference pages are made from the code by `python -m docs.build`."""
