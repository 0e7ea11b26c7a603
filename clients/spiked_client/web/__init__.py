"""The web page: a server of its own that knows the rig through the public protocol only, and the page's static files.

    python -m spiked_client.web --connect 127.0.0.1

Needs aiohttp (`pip install 'spiked[web]'`), which nothing else of the client imports. Whatever a browser does, or a thousand of
them, ends here: between this process and the daemon there is one subscription, however many look.
"""
