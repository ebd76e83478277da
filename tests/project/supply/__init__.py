"""What is installed, and from where: commands over the locks of `configs/locks`.

`make audit`, `make sbom` and `make licences` run them; `docs/security.md` says what they defend.
Nothing of the server imports them.
"""
