// An HTTP server in Java: answers /CONNECTION/QUESTION if the question is the next one of that connection.
import com.sun.net.httpserver.HttpServer;
import java.net.InetSocketAddress;
import java.util.concurrent.ConcurrentHashMap;
import java.util.concurrent.Executors;

public class Server {
    static final ConcurrentHashMap<Integer, Integer> LAST = new ConcurrentHashMap<>();

    // Makes garbage, so that the collector's threads have work, and waits with time limits.
    static void litter() {
        byte[][] kept = new byte[64][];
        for (int n = 0; ; n++) {
            kept[n % kept.length] = new byte[32_000];
            kept[n % kept.length][n % 32_000] = 1;
            try {
                Thread.sleep(1);
            } catch (InterruptedException ended) {
                return;
            }
        }
    }

    public static void main(String[] arguments) throws Exception {
        for (int n = 0; n < 3; n++) {
            Thread thread = new Thread(Server::litter);
            thread.setDaemon(true);
            thread.start();
        }
        HttpServer server = HttpServer.create(new InetSocketAddress("0.0.0.0", 8000), 0);
        server.createContext("/", exchange -> {
            String[] parts = exchange.getRequestURI().getPath().split("/");
            int connection = Integer.parseInt(parts[1]);
            int question = Integer.parseInt(parts[2]);
            Integer before = LAST.put(connection, question);
            boolean next = question == (before == null ? 0 : before) + 1;
            byte[] text = (next ? connection + ":" + question + ":" + "x".repeat(question % 1000)
                                : question + " after " + before).getBytes();
            exchange.sendResponseHeaders(next ? 200 : 500, text.length);
            exchange.getResponseBody().write(text);
            exchange.close();
        });
        server.setExecutor(Executors.newFixedThreadPool(4));
        server.start();
    }
}
