package org.pytorch.serve.wlm;

import java.lang.reflect.Field;
import java.util.Map;
import java.util.concurrent.ExecutionException;
import java.util.concurrent.LinkedBlockingDeque;
import org.pytorch.serve.job.Job;
import org.pytorch.serve.util.messages.WorkerCommands;

/**
 * Takes the place of TorchServe's class of this name, which "continuousBatching: true" of model-config.yaml asks for: a
 * worker takes all requests that wait, up to batchSize of them, as soon as it is free, and waits for no more to come.
 *
 * <p>TorchServe 0.12 lets a free worker wait for maxBatchDelay, a millisecond at least, and the others behind it. While
 * all workers are busy a batch fills without that; while one is free the wait is all that a request gets from it. Its own
 * continuous batching does the same, and asks a worker again and again for a description that was asked for once.
 *
 * <p>HttpPostRequestDecoder.java says how Java finds this class, and how to compile it.
 */
public class ContinuousBatching extends BatchAggregator {
    private final LinkedBlockingDeque<Job> queue;

    public ContinuousBatching(Model model) {
        super(model);
        queue = queueOf(model);
    }

    /** Only Model's own methods reach its queue, and those wait while they hold its lock. */
    @SuppressWarnings("unchecked")
    private static LinkedBlockingDeque<Job> queueOf(Model model) {
        try {
            Field queues = Model.class.getDeclaredField("jobsDb");
            queues.setAccessible(true);
            return ((Map<String, LinkedBlockingDeque<Job>>) queues.get(model)).get(Model.DEFAULT_DATA_QUEUE);
        } catch (ReflectiveOperationException error) {
            throw new IllegalStateException("torchserve/java is made for TorchServe 0.12, which this is not", error);
        }
    }

    /** Fills {@code jobs}: with a command to the worker, with a request for its description, or with a batch. */
    @Override
    public void pollBatch(String worker, WorkerState state) throws InterruptedException, ExecutionException {
        if (state != WorkerState.WORKER_MODEL_LOADED) {
            super.pollBatch(worker, state);
        } else if (!model.pollMgmtJob(worker, 0, jobs)) {
            Job job = queue.take();
            jobs.put(job.getJobId(), job);
            if (job.getCmd() != WorkerCommands.DESCRIBE) {
                fill();
            }
        }
    }

    private void fill() {
        while (jobs.size() < model.getBatchSize()) {
            Job job = queue.poll();
            if (job == null) {
                return;
            }
            if (job.getCmd() == WorkerCommands.DESCRIBE) { // goes to a worker alone
                if (!queue.offerFirst(job)) {
                    job.sendError(503, "The queue of this model is full.");
                }
                return;
            }
            jobs.put(job.getJobId(), job);
        }
    }
}
