"""What keeps a job from failing late, or from taking the computer with it.

Before the sorter: `versions` (packages that do not work together) and `canary` (the sorter on the first seconds).
While it works: `sensors` read the computer, `limits` judge what was read, `watch` puts them together.
"""
