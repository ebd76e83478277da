import static java.nio.charset.StandardCharsets.UTF_8;

import java.net.URI;
import java.net.URLEncoder;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse.BodyHandlers;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.Base64;
import java.util.Map;
import java.util.TreeMap;
import java.util.regex.Matcher;
import java.util.regex.Pattern;
import java.util.stream.Collectors;

/** Edits a picture: java Example.java PICTURE MASK PROMPT OUT. It needs nothing but a JDK. */
public final class Example {
    static final String URL = System.getenv().getOrDefault("INPAINT_URL", "http://127.0.0.1:8000");
    static final String KEY = System.getenv().getOrDefault("INPAINT_KEY", "");
    static final HttpClient CLIENT = HttpClient.newHttpClient();

    public static void main(String[] arguments) throws Exception {
        String answer = post("/api/v3/inpaint", Map.of(
            "prompt", arguments[2],
            "init_image", base64Of(arguments[0]),
            "mask_image", base64Of(arguments[1])));
        while (field(answer, "status").equals("processing")) {
            Thread.sleep(1000);
            answer = post("/api/v3/fetch/" + field(answer, "id"), Map.of());
        }
        if (!field(answer, "status").equals("success")) {
            System.err.println(answer);
            System.exit(1);
        }
        HttpRequest picture = HttpRequest.newBuilder(URI.create(field(answer, "output"))).build();
        CLIENT.send(picture, BodyHandlers.ofFile(Path.of(arguments[3])));
    }

    /** Sends a URL-encoded form, because a JDK has nothing that writes JSON. */
    static String post(String path, Map<String, String> fields) throws Exception {
        Map<String, String> all = new TreeMap<>(fields);
        all.put("key", KEY);
        String form = all.entrySet().stream()
            .map(each -> each.getKey() + "=" + URLEncoder.encode(each.getValue(), UTF_8))
            .collect(Collectors.joining("&"));
        HttpRequest request = HttpRequest.newBuilder(URI.create(URL + path))
            .header("Content-Type", "application/x-www-form-urlencoded")
            .POST(HttpRequest.BodyPublishers.ofString(form))
            .build();
        return CLIENT.send(request, BodyHandlers.ofString()).body();
    }

    /** The value of a field, or its first one where it is a list. A JSON library would do this. */
    static String field(String answer, String name) {
        Matcher found = Pattern.compile("\"" + name + "\":\\s*\\[?\"?([^\\],\"}]*)").matcher(answer);
        return found.find() ? found.group(1) : "";
    }

    static String base64Of(String path) throws Exception {
        return Base64.getEncoder().encodeToString(Files.readAllBytes(Path.of(path)));
    }
}
