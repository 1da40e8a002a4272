/* A load generator that follows a connection from submit to result: one thread, epoll, keep-alive, no pipelining.
 *
 *   load MODE HOST:PORT PATH CONNECTIONS SECONDS [INTERVAL_MS]
 *
 *   submit     POST PATH, 202; the next one follows the answer (closed loop)
 *   sync       POST PATH, 200; closed loop
 *   get        GET PATH, 200; closed loop
 *   poll       GET PATH, 200
 *   cycle      POST PATH; GET the status at once and then 2 ms after each answer until it says Completed; GET the result
 *   completed  submit for SECONDS, then follow the last job of each connection until it is Completed;
 *              the rate is jobs by the time until the last of these is
 *
 * With INTERVAL_MS each connection begins anew so often (open loop), and what it does is timed from the moment that it
 * was due; without, when it has its answer (closed loop).
 *
 * A POST has a JSON body of 400 bytes. Where a 202 has a Location, that is the status; where the status has one, that
 * is the result, else the status with /result for /status. Prints one JSON object: what was done (requests: submits,
 * polls, or whole cycles), seconds, rate, latency in microseconds (of a submit, a poll, a whole cycle), errors by
 * status code (0: the connection was lost; 1: a job that failed), and its own CPU seconds. An error costs 10 ms.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

enum mode { SUBMIT, SYNC, GET, POLL, CYCLE, COMPLETED, MODES };
enum stage { FIRST, STATUS, RESULT };                       /* which request of the chain is under way */
enum part { HEAD, LENGTH, CHUNK_SIZE, CHUNK, CHUNK_END, TRAILER }; /* where in the answer the next byte is */

static const char *const mode_names[MODES] = {"submit", "sync", "get", "poll", "cycle", "completed"};
static const int wanted[MODES] = {202, 200, 200, 200, 202, 202}; /* of the first request of a chain */
static const int64_t MS = 1000000;
static const int64_t PATIENCE = 120000; /* ms that "completed" waits after the last submit */

struct connection {
    int fd, busy, closing, code, line;
    enum stage stage;
    enum part part;
    int64_t due;     /* when the next request is to be sent; 0: not before the answer */
    int64_t started; /* of what is measured */
    int64_t planned; /* poll: when the next one falls due */
    uint64_t left;   /* bytes of the body or chunk still to come */
    size_t head_length, body_length;
    char head[8192], body[1024]; /* of the body, its beginning is enough */
    char status[512], location[512];
};

static enum mode mode;
static struct sockaddr_in address;
static char host[64], path[1024], payload[401];
static struct connection *connections;
static int count, poller;
static int64_t began, ending, interval;
static uint64_t jobs, errors[1000];
static uint32_t *samples;
static size_t sampled, room;

static void die(const char *what)
{
    perror(what);
    exit(2);
}

static int64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000 * MS + t.tv_nsec;
}

static void sample(int64_t since)
{
    if (sampled == room && !(samples = realloc(samples, (room = room ? room * 2 : 1 << 16) * sizeof *samples)))
        die("memory");
    samples[sampled++] = (uint32_t)((now() - since) / 1000);
}

static void open_connection(struct connection *c)
{
    int one = 1;
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (c->fd < 0 || connect(c->fd, (struct sockaddr *)&address, sizeof address) < 0)
        die("connect");
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = c};
    if (epoll_ctl(poller, EPOLL_CTL_ADD, c->fd, &event) < 0)
        die("epoll_ctl");
}

/* Send the request of the connection's stage. */
static void send_request(struct connection *c)
{
    static char out[4096];
    const char *where = c->stage == FIRST ? path : c->stage == STATUS ? c->status : c->location;
    int post = c->stage == FIRST && mode != GET && mode != POLL;
    int length = snprintf(out, sizeof out, "%s %s HTTP/1.1\r\nHost: %s\r\nAccept: */*\r\n", post ? "POST" : "GET", where, host);
    length += post ? snprintf(out + length, sizeof out - (size_t)length,
                              "Content-Type: application/json\r\nContent-Length: %zu\r\n\r\n%s", strlen(payload), payload)
                   : snprintf(out + length, sizeof out - (size_t)length, "\r\n");
    if (c->stage == FIRST)
        c->started = mode == POLL ? c->planned : now();
    c->due = 0;
    c->busy = 1;
    c->part = HEAD;
    c->head_length = c->body_length = 0;
    if (send(c->fd, out, (size_t)length, MSG_NOSIGNAL) < 0 && errno != EPIPE && errno != ECONNRESET)
        die("send"); /* a lost connection shows when it is read */
}

static void fail(struct connection *c, int code)
{
    errors[code]++;
    c->stage = FIRST;
    c->due = now() + 10 * MS;
}

/* Copy the path of Location's URL, absolute or relative, to `to`; false if there is none. */
static int location(const char *head, char *to, size_t size)
{
    const char *at = strcasestr(head, "\r\nlocation:");
    if (!at)
        return 0;
    at += strlen("\r\nlocation:");
    at += strspn(at, " ");
    const char *scheme = strstr(at, "://"), *end = strpbrk(at, "\r\n");
    if (scheme && scheme < end)
        at = strchr(scheme + 3, '/');
    if (!at || at >= end || (size_t)(end - at) >= size)
        return 0;
    memcpy(to, at, (size_t)(end - at));
    to[end - at] = 0;
    return 1;
}

/* The whole answer is there: account for it and say what comes next. */
static void answered(struct connection *c)
{
    c->busy = 0;
    if (c->closing) {
        close(c->fd);
        open_connection(c);
        c->closing = 0;
    }
    if (c->code != (c->stage == FIRST ? wanted[mode] : 200)) {
        fail(c, c->code);
        return;
    }
    c->body[c->body_length] = 0;
    if (c->stage == FIRST && wanted[mode] == 202) {
        if (!location(c->head, c->status, sizeof c->status)) {
            fprintf(stderr, "a 202 without Location:\n%s\n", c->head);
            exit(2);
        }
        jobs++;
    } else if (c->stage == STATUS) {
        if (strstr(c->body, "\"Error\"")) {
            fail(c, 1);
            return;
        }
        if (!strstr(c->body, "\"Completed\"")) {
            c->due = now() + 2 * MS;
            return;
        }
        if (!location(c->head, c->location, sizeof c->location)) {
            strcpy(c->location, c->status);
            char *word = strstr(c->location, "/status");
            if (word)
                memcpy(word, "/result", strlen("/result"));
        }
    }
    if (mode == CYCLE && c->stage != RESULT) {
        c->stage++;
        send_request(c);
        return;
    }
    if (mode == COMPLETED && c->stage == STATUS)
        return; /* this connection is through: neither busy nor due */
    sample(c->started);
    c->stage = FIRST;
    if (interval) {
        c->planned += interval;
        c->due = c->planned;
    } else if (now() < ending) {
        send_request(c);
    } else if (mode == COMPLETED) {
        c->stage = STATUS;
        send_request(c);
    }
}

static void read_head(struct connection *c)
{
    const char *at;
    c->code = atoi(c->head + strcspn(c->head, " "));
    if (c->code < 100 || c->code > 999)
        c->code = 999;
    c->closing = strcasestr(c->head, "\r\nconnection: close") != NULL;
    if ((at = strcasestr(c->head, "\r\ncontent-length:"))) {
        c->left = strtoull(at + strlen("\r\ncontent-length:"), NULL, 10);
        c->part = LENGTH;
    } else if (strcasestr(c->head, "\r\ntransfer-encoding: chunked")) {
        c->left = 0;
        c->part = CHUNK_SIZE;
    } else {
        fprintf(stderr, "an answer of neither known length nor chunks:\n%s\n", c->head);
        exit(2);
    }
}

/* Take the bytes of one answer. */
static void feed(struct connection *c, const char *data, size_t n)
{
    while (n && c->busy) {
        if (c->part == HEAD) {
            if (c->head_length + 1 >= sizeof c->head)
                die("an answer's head is too long");
            c->head[c->head_length++] = *data++, n--;
            if (c->head_length >= 4 && !memcmp(c->head + c->head_length - 4, "\r\n\r\n", 4)) {
                c->head[c->head_length] = 0;
                read_head(c);
            }
        } else if (c->part == LENGTH || c->part == CHUNK) {
            size_t some = n < c->left ? n : (size_t)c->left, keep = sizeof c->body - 1 - c->body_length;
            keep = keep < some ? keep : some;
            memcpy(c->body + c->body_length, data, keep);
            c->body_length += keep;
            data += some, n -= some, c->left -= some;
            if (!c->left && c->part == CHUNK)
                c->part = CHUNK_END;
        } else {
            char byte = *data++;
            n--;
            if (c->part == CHUNK_SIZE && byte != '\r' && byte != '\n') {
                c->left = c->left * 16 + (uint64_t)(byte <= '9' ? byte - '0' : (byte | 32) - 'a' + 10);
            } else if (c->part == CHUNK_SIZE && byte == '\n') {
                c->part = c->left ? CHUNK : TRAILER;
                c->line = 0;
            } else if (c->part == CHUNK_END && byte == '\n') {
                c->part = CHUNK_SIZE;
            } else if (c->part == TRAILER && byte == '\n' && !c->line) {
                answered(c);
            } else if (c->part == TRAILER && byte != '\r') {
                c->line = byte != '\n';
            }
        }
        if (c->busy && c->part == LENGTH && !c->left) {
            answered(c);
            return; /* what the answer led to may have sent the next request: nothing of this read belongs to it */
        }
    }
}

static void receive(struct connection *c)
{
    static char in[1 << 18];
    ssize_t n = recv(c->fd, in, sizeof in, MSG_DONTWAIT);
    if (n > 0) {
        feed(c, in, (size_t)n);
    } else if (n == 0 || (errno != EAGAIN && errno != EINTR)) { /* lost; while idle that is the server's right */
        close(c->fd);
        open_connection(c);
        if (c->busy) {
            c->busy = 0;
            fail(c, 0);
        }
    }
}

static int ascending(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

static uint32_t quantile(double q)
{
    return sampled ? samples[(size_t)(q * (double)(sampled - 1) + 0.5)] : 0;
}

static void report(int64_t end)
{
    struct rusage used;
    getrusage(RUSAGE_SELF, &used);
    double seconds = (double)(end - began) / 1e9;
    double cpu = (double)(used.ru_utime.tv_sec + used.ru_stime.tv_sec) +
                 (double)(used.ru_utime.tv_usec + used.ru_stime.tv_usec) / 1e6;
    qsort(samples, sampled, sizeof *samples, ascending);
    printf("{\"requests\": %zu, \"seconds\": %.3f, \"rate\": %.1f, \"p50_us\": %u, \"p90_us\": %u, \"p99_us\": %u, "
           "\"max_us\": %u, \"jobs\": %llu, \"cpu_seconds\": %.2f, \"errors\": {",
           sampled, seconds, (double)sampled / seconds, quantile(0.5), quantile(0.9), quantile(0.99), quantile(1),
           (unsigned long long)jobs, cpu);
    for (int code = 0, some = 0; code < 1000; code++)
        if (errors[code])
            printf("%s\"%d\": %llu", some++ ? ", " : "", code, (unsigned long long)errors[code]);
    puts("}}");
}

int main(int argc, char **argv)
{
    char *colon = argc > 2 ? strchr(argv[2], ':') : NULL;
    while (mode < MODES && (argc < 2 || strcmp(argv[1], mode_names[mode])))
        mode++;
    if (argc < 6 || mode == MODES || !colon || (mode == POLL && argc < 7)) {
        fputs("usage: load submit|sync|get|poll|cycle|completed HOST:PORT PATH CONNECTIONS SECONDS [INTERVAL_MS]\n", stderr);
        return 2;
    }
    snprintf(host, sizeof host, "%s", argv[2]);
    snprintf(path, sizeof path, "%s", argv[3]);
    count = atoi(argv[4]);
    interval = argc > 6 ? (int64_t)(atof(argv[6]) * 1e6) : 0;
    snprintf(payload, sizeof payload, "{\"pad\":\"%0390d\"}", 0);
    *colon = 0;
    address.sin_family = AF_INET;
    address.sin_port = htons((uint16_t)atoi(colon + 1));
    if (inet_pton(AF_INET, argv[2], &address.sin_addr) != 1 || count < 1) {
        fputs("HOST is an IPv4 address, CONNECTIONS at least 1\n", stderr);
        return 2;
    }
    int timer = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
    poller = epoll_create1(EPOLL_CLOEXEC);
    struct epoll_event ticking = {.events = EPOLLIN, .data.ptr = NULL}, events[512];
    if (timer < 0 || poller < 0 || epoll_ctl(poller, EPOLL_CTL_ADD, timer, &ticking) < 0)
        die("epoll");
    connections = calloc((size_t)count, sizeof *connections);
    for (int i = 0; i < count; i++)
        open_connection(&connections[i]);

    began = now();
    ending = began + (int64_t)(atof(argv[5]) * 1e9);
    for (int i = 0; i < count; i++) /* spread over the interval, if there is one */
        connections[i].due = connections[i].planned = began + interval * i / count;
    int64_t armed = 0;
    for (;;) {
        int64_t present = now(), next = INT64_MAX;
        int active = 0;
        for (int i = 0; i < count; i++) {
            struct connection *c = &connections[i];
            if (c->due && c->stage == FIRST && present >= ending)
                c->due = 0;
            else if (c->due && c->due <= present)
                send_request(c);
            active += c->busy || c->due;
            if (c->due && c->due < next)
                next = c->due;
        }
        if (!active || present > ending + PATIENCE * MS)
            break;
        if (next != INT64_MAX && next != armed) {
            struct itimerspec when = {.it_value = {next / (1000 * MS), next % (1000 * MS)}};
            timerfd_settime(timer, TFD_TIMER_ABSTIME, &when, NULL);
            armed = next;
        }
        int n = epoll_wait(poller, events, 512, 1000);
        for (int i = 0; i < n; i++)
            if (events[i].data.ptr)
                receive(events[i].data.ptr);
            else if (read(timer, &(uint64_t){0}, 8) == 8)
                armed = 0;
    }
    report(now());
    return 0;
}
