"""Results as text and as HTML, from one document model. Nothing is computed here.

`blocks` has the few shapes a report is made of, `render` turns values of the other rooms into
them, `text` and `html` draw them.
"""
