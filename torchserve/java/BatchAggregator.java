package org.pytorch.serve.wlm;

import java.lang.reflect.Field;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.concurrent.ExecutionException;
import java.util.concurrent.LinkedBlockingDeque;
import org.pytorch.serve.job.Job;
import org.pytorch.serve.job.RestJob;
import org.pytorch.serve.util.messages.BaseModelRequest;
import org.pytorch.serve.util.messages.ModelInferenceRequest;
import org.pytorch.serve.util.messages.ModelLoadModelRequest;
import org.pytorch.serve.util.messages.ModelWorkerResponse;
import org.pytorch.serve.util.messages.Predictions;
import org.pytorch.serve.util.messages.RequestInput;
import org.pytorch.serve.util.messages.WorkerCommands;
import org.slf4j.Logger;
import org.slf4j.LoggerFactory;

/**
 * Takes the place of TorchServe's class of this name, which gives a worker its work and hands on its answers: a worker
 * that is free takes all requests that wait, up to batchSize of them, and waits for no more to come.
 *
 * <p>TorchServe 0.12 lets a free worker wait for maxBatchDelay, a millisecond at least, and the others behind it. While
 * all workers are busy a batch fills without that; while one is free the wait is all that a request gets from it. Nor
 * does a worker compute here what nobody waits for any more: the requests of clients that have closed their connection.
 *
 * <p>Its other kinds of batching (sequenceBatching, continuousBatching, asyncCommunication) extend this class and
 * choose by themselves. HttpPostRequestDecoder.java says how Java finds it, and how to compile it.
 */
public class BatchAggregator {
    private static final Logger LOGGER = LoggerFactory.getLogger(BatchAggregator.class);

    protected Model model;
    protected Map<String, Job> jobs = new LinkedHashMap<>(); // what the worker has now, by request id
    private final LinkedBlockingDeque<Job> queue;

    public BatchAggregator(Model model) {
        this.model = model;
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

    /** Waits for work: a model to load, a description to give, or a batch. */
    public BaseModelRequest getRequest(String worker, WorkerState state)
            throws InterruptedException, ExecutionException {
        cleanJobs();
        pollBatch(worker, state);
        if (model.isUseJobTicket() && jobs.isEmpty()) {
            model.decNumJobTickets();
        }
        ModelInferenceRequest batch = new ModelInferenceRequest(model.getModelName());
        for (Job job : jobs.values()) {
            if (job.isControlCmd()) {
                String gpu = job.getPayload().getStringParameter("gpu");
                return new ModelLoadModelRequest(model, gpu == null ? -1 : Integer.parseInt(gpu));
            }
            batch.setCommand(job.getCmd());
            job.setScheduled();
            batch.addRequest(job.getPayload());
        }
        return batch;
    }

    /** Fills {@code jobs}. With job tickets free workers are counted, which only the model's own method does. */
    public void pollBatch(String worker, WorkerState state) throws InterruptedException, ExecutionException {
        boolean loaded = state == WorkerState.WORKER_MODEL_LOADED;
        if (!loaded || model.isUseJobTicket()) {
            model.pollBatch(worker, loaded ? 0 : Long.MAX_VALUE, jobs);
        } else if (!model.pollMgmtJob(worker, 0, jobs)) {
            Job job = queue.take();
            while (!isAwaited(job)) {
                job = queue.take();
            }
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
            if (isAwaited(job)) {
                jobs.put(job.getJobId(), job);
            }
        }
    }

    /** The client is there, and its time is not over. A job of gRPC does not know: its isOpen() says the opposite. */
    private static boolean isAwaited(Job job) {
        return !isLate(job) && (job.isOpen() || !(job instanceof RestJob));
    }

    private static boolean isLate(Job job) {
        return job.getPayload().getClientExpireTS() <= System.currentTimeMillis();
    }

    /** Hands a worker's answer on to the clients; false when it is a part of a stream that goes on. */
    public boolean sendResponse(ModelWorkerResponse answer) {
        if (answer.getCode() != 200) {
            for (Job job : jobs.values()) {
                if (!isLate(job)) {
                    job.sendError(answer.getCode(), answer.getMessage());
                }
            }
        } else if (!jobs.isEmpty()) { // it is when the model of a new worker was loaded
            boolean last = true;
            for (Predictions each : answer.getPredictions()) {
                Job job = jobs.get(each.getRequestId());
                if (job == null) {
                    throw new IllegalStateException("The worker answers what it was not asked: " + each.getRequestId());
                }
                last &= !"true".equals(each.getHeaders().get(RequestInput.TS_STREAM_NEXT));
                if (!isLate(job)) {
                    job.response(
                            each.getResp(),
                            each.getContentType(),
                            each.getStatusCode(),
                            each.getReasonPhrase(),
                            each.getHeaders());
                }
            }
            if (!last) {
                return false;
            }
        }
        cleanJobs();
        return true;
    }

    /** The worker failed: {@code batch} is what it had, or null when it had nothing, and all goes back to the queue. */
    public void sendError(BaseModelRequest batch, String message, int status) {
        if (batch instanceof ModelLoadModelRequest) {
            LOGGER.warn("The model {} was not loaded: {}", batch.getModelName(), message);
            return;
        }
        for (Job job : List.copyOf(jobs.values())) {
            if (batch == null && !job.isControlCmd()) {
                handleErrorJob(job);
            } else {
                job.sendError(status, message);
            }
        }
        cleanJobs();
    }

    public void cleanJobs() {
        jobs.clear();
    }

    public void handleErrorJob(Job job) {
        model.addFirst(job);
    }

    /** For the kinds of batching that have threads of their own. */
    public void shutdown() {}

    /** For the kinds of batching that have threads of their own. */
    public void startEventDispatcher() {}
}
