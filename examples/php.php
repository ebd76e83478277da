<?php
// Edits a picture: php php.php PICTURE MASK PROMPT OUT
[, $picture, $mask, $prompt, $out] = $argv;

function post(string $path, array $fields): array
{
    $url = getenv('INPAINT_URL') ?: 'http://127.0.0.1:8000';
    $fields['key'] = getenv('INPAINT_KEY') ?: '';
    $context = stream_context_create(['http' => [
        'method' => 'POST',
        'header' => 'Content-Type: application/json',
        'content' => json_encode($fields, JSON_THROW_ON_ERROR),
        'ignore_errors' => true, // The body of an answer with another status is wanted too.
    ]]);
    return json_decode(file_get_contents($url . $path, false, $context), true, 512, JSON_THROW_ON_ERROR);
}

$answer = post('/api/v3/inpaint', [
    'prompt' => $prompt,
    'init_image' => base64_encode(file_get_contents($picture)),
    'mask_image' => base64_encode(file_get_contents($mask)),
]);
while ($answer['status'] === 'processing') {
    sleep(1);
    $answer = post("/api/v3/fetch/{$answer['id']}", []);
}
if ($answer['status'] !== 'success') {
    fwrite(STDERR, json_encode($answer) . "\n");
    exit(1);
}
file_put_contents($out, file_get_contents($answer['output'][0]));
