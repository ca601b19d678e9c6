package io.netty.handler.codec.http.multipart;

import io.netty.handler.codec.http.FullHttpRequest;
import io.netty.handler.codec.http.HttpRequest;
import java.io.IOException;
import org.pytorch.serve.http.ServiceUnavailableException;

/**
 * Takes the place of netty's class of this name, so that TorchServe passes every body on as it is, and refuses a large
 * one while it has no room for it.
 *
 * <p>TorchServe 0.12 takes a form apart with netty 4.1.53 before any model sees it: it answers 500 to a part without a
 * name, keeps one of several fields of a name, damages what "curl -d" sends, and a form of many fields ends the process
 * (CVE-2024-29025). With this, src/inference/requests.py takes multipart forms apart, in a worker.
 *
 * <p>Java finds it because TorchServe's class path begins with the current folder. Compile all with a JDK 17:
 * <pre>javac --release 17 -g:none -d torchserve/java -cp JAR torchserve/java/*.java</pre>
 * where JAR is ts/frontend/model-server.jar of the Python environment. tests/test_java.py compares the result.
 */
public class HttpPostRequestDecoder {
    private static final int LARGE = 1 << 17; // bytes
    private static final long PAUSE = 100_000_000; // nanoseconds between two collections that are asked for
    private static long collected = System.nanoTime() - PAUSE;

    private final MemoryAttribute body = new MemoryAttribute("body");
    private boolean taken;

    public HttpPostRequestDecoder(HttpDataFactory factory, HttpRequest request) throws IOException {
        body.setContent(((FullHttpRequest) request).content().retain());
    }

    /**
     * TorchServe asks this first, and makes an instance for application/x-www-form-urlencoded alone.
     *
     * @throws ServiceUnavailableException which TorchServe answers with 503
     */
    public static boolean isMultipart(HttpRequest request) {
        int size = ((FullHttpRequest) request).content().readableBytes();
        if (size > LARGE && !hasRoom(size)) {
            throw new ServiceUnavailableException(
                    "The server holds as many large bodies as it can; send this one again in a second.");
        }
        return false;
    }

    /** A body is copied into the queue, and a batch is copied twice on its way to a worker: three times in all. */
    private static synchronized boolean hasRoom(long size) {
        Runtime runtime = Runtime.getRuntime();
        long room = runtime.maxMemory() / 3 - size;
        if (runtime.totalMemory() - runtime.freeMemory() > room && System.nanoTime() - collected > PAUSE) {
            System.gc();
            collected = System.nanoTime();
        }
        return runtime.totalMemory() - runtime.freeMemory() <= room;
    }

    public boolean hasNext() {
        return !taken;
    }

    public InterfaceHttpData next() {
        taken = true;
        return body;
    }

    public void cleanFiles() {}

    public void destroy() {
        body.delete();
    }
}
