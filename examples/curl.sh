#!/bin/sh
# Edits a picture: curl.sh PICTURE MASK PROMPT OUT
set -eu
url=${INPAINT_URL:-http://127.0.0.1:8000}
key=${INPAINT_KEY:-}

# The value of a field in $answer, or its first one where it is a list.
field() {
    printf '%s' "$answer" | sed -n "s/.*\"$1\": *\[*\"*\([^],\"}]*\).*/\1/p"
}

answer=$(curl -sS "$url/api/v3/inpaint" --form-string "key=$key" --form-string "prompt=$3" \
    --form "init_image=@$1" --form "mask_image=@$2")
fetch=$(field fetch_result)
while [ "$(field status)" = processing ]; do
    sleep 1
    answer=$(curl -sS "$fetch" --form-string "key=$key")
done
if [ "$(field status)" != success ]; then
    echo "$answer" >&2
    exit 1
fi
curl -sS --fail --output "$4" "$(field output)"
