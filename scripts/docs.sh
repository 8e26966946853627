#!/usr/bin/env bash
# Builds the documentation as a site, build/site, with mkdocs in .venv-docs from scripts/requirements-docs.txt. Every warning is an error.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
unset PYTHONPATH PYTHONHOME
docs=.venv-docs
stamp=$docs/.ready-$(sha256sum <scripts/requirements-docs.txt | cut -c1-16)
python=.venv/bin/python
if [[ ! -x $python ]]; then python=${PYTHON:-python3}; fi
if [[ ! -e $stamp ]]; then
  echo "==> Setting up $docs: mkdocs, which builds the site"
  "$python" -m venv --clear "$docs"
  "$docs/bin/python" -m pip install --disable-pip-version-check --no-input --no-deps -r scripts/requirements-docs.txt
  touch "$stamp"
fi
"$docs/bin/python" -m mkdocs build --strict --clean
# Whoever reads the site tells nobody else: nothing on a page comes from another server.
if grep -rnoE --include='*.html' '<(script|img|iframe)[^>]* src="(https?:)?//[^"]*|<link[^>]* href="(https?:)?//[^"]*' build/site; then
  echo "error: expected pages that load nothing from elsewhere, found the above" >&2
  exit 1
fi
if grep -rnoE --include='*.css' '(url\(|@import )["'\'']?(https?:)?//[^)]*' build/site; then
  echo "error: expected style sheets that load nothing from elsewhere, found the above" >&2
  exit 1
fi
echo "==> The site is build/site/index.html"
