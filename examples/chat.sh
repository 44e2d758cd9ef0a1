#!/bin/sh
# A chat with an edge agent, by curl: examples/chat.sh "Why is the sky blue?"
set -eu
url=${OPENAI_BASE_URL:-http://127.0.0.1:8080/v1}
question=$(printf %s "${1:-Why is the sky blue?}" | sed 's/[\\"]/\\&/g')  # as JSON wants it

curl --silent --show-error --fail-with-body --no-buffer "$url/chat/completions" \
    --header "Authorization: Bearer ${OPENAI_API_KEY:-none}" \
    --header "Content-Type: application/json" \
    --data "$(printf '{"model": "target", "stream": true, "max_tokens": 64, "temperature": 0,
        "messages": [{"role": "user", "content": "%s"}]}' "$question")"
