"""The demonstration: a page in the browser for one model, and the server behind it (extra ``demo``).

``page``: the routes, and the server; ``page.html``: all that the browser runs. ``jobs``: one after another has the
model. ``guard``: who may ask, and how much. ``recipe``: the command and the Python that draw the same.

Rows travel as tokens and are coloured in the browser. Nothing is written to disk, and nothing is asked of another
address.

May use: pipeline, sampling, image, and the ground; alone imports starlette and uvicorn.
"""
