/* The floor: what N sockets cost when a server does nothing but one write(2) for each frame.
 *
 * floor PORT SIZE -- listens on 127.0.0.1:PORT; each line "RATE COUNT" on stdin sends COUNT frames of SIZE bytes, RATE a
 * second, to every socket accepted so far, and is answered with "done". A socket whose client has gone is forgotten.
 * The frame is the relay's own, with a number and the time of its making, so that it is checked in the same way.
 */
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { MOST_SOCKETS = 20000, HEADER = 4 };

static int sockets[MOST_SOCKETS];
static int count;

static void make_frame(char *frame, int size, unsigned number) {
    struct timespec now;
    int length = size - HEADER, made;
    clock_gettime(CLOCK_REALTIME, &now);
    frame[0] = (char)0x81;
    frame[1] = 126;
    frame[2] = (char)(length >> 8);
    frame[3] = (char)length;
    made = snprintf(frame + HEADER, length, "[null,null,\"room:1\",\"new_msg\",{\"n\":\"%08u\",\"t\":\"%019lld\",\"x\":\"",
                    number, now.tv_sec * 1000000000LL + now.tv_nsec);
    memset(frame + HEADER + made, 'y', length - made - 3);
    memcpy(frame + size - 3, "\"}]", 3);
}

static void send_to_all(const char *frame, int size) {
    int i, kept = 0;
    for (i = 0; i < count; i++) {
        if (write(sockets[i], frame, size) == size)
            sockets[kept++] = sockets[i];
        else
            close(sockets[i]);
    }
    count = kept;
}

static void run(double rate, unsigned events, int size) {
    char *frame = malloc(size);
    struct timespec due;
    unsigned number;
    clock_gettime(CLOCK_MONOTONIC, &due);
    for (number = 0; number < events; number++) {
        clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &due, NULL);
        make_frame(frame, size, number);
        send_to_all(frame, size);
        due.tv_nsec += (long)(1e9 / rate);
        while (due.tv_nsec >= 1000000000L) {
            due.tv_nsec -= 1000000000L;
            due.tv_sec++;
        }
    }
    free(frame);
}

int main(int argc, char **argv) {
    struct sockaddr_in address = {.sin_family = AF_INET};
    int listener = socket(AF_INET, SOCK_STREAM, 0), yes = 1, accepted;
    char line[64];
    if (argc != 3) {
        fprintf(stderr, "usage: floor PORT SIZE\n");
        return 2;
    }
    signal(SIGPIPE, SIG_IGN);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    address.sin_port = htons(atoi(argv[1]));
    if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 4096)) {
        perror("floor");
        return 1;
    }
    for (;;) {
        struct pollfd ready[2] = {{.fd = listener, .events = POLLIN}, {.fd = 0, .events = POLLIN}};
        if (poll(ready, 2, -1) < 0)
            return 1;
        if (ready[0].revents & POLLIN) {
            accepted = accept(listener, NULL, NULL);
            if (accepted < 0)
                continue;
            /* As asyncio and every server measured here do; else the kernel would hold frames back and join them. */
            setsockopt(accepted, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
            if (count < MOST_SOCKETS)
                sockets[count++] = accepted;
            else
                close(accepted);
        } else if (ready[1].revents) {
            double rate;
            unsigned events;
            if (!fgets(line, sizeof line, stdin))
                return 0;
            if (sscanf(line, "%lf %u", &rate, &events) == 2)
                run(rate, events, atoi(argv[2]));
            printf("done\n");
            fflush(stdout);
        }
    }
}
