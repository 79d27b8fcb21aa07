/* Drives as a BIOS sees them, by INT 13h: on `g` each says its second sector and gets it back as its third; on `w` the
   first drive is written, sector by sector with its number, until `q`. Real mode (-m16): below 64 KiB all the time. */
__asm__(".code16gcc\n.section .entry, \"ax\"\n call kernel\n hlt");
#include "pc.h"

static u8 data[512] __attribute__((aligned(16)));
static struct {
    u8 size, zero;
    u16 count, offset, segment;
    u32 low, high;
} __attribute__((packed)) packet = {16, 0, 1, 0, 0, 0, 0};

/* INT 13h with DS:SI at `packet`; AH of the answer, 0 when it went well. */
static u8 disk(u8 function, u8 drive, u32 sector) {
    u32 ax = (u32)function << 8;
    packet.count = 1; /* the BIOS leaves there how many it moved */
    packet.offset = (u16)(u32)data;
    packet.low = sector;
    __asm__ volatile("int $0x13; jc 1f; xor %%ah, %%ah; 1:" : "+a"(ax) : "d"((u32)drive), "S"(&packet) : "memory", "cc");
    return ax >> 8;
}
static u8 floppy(u8 function, u32 sector) {
    u32 ax = (u32)function << 8 | 1;
    __asm__ volatile("int $0x13; jc 1f; xor %%ah, %%ah; 1:"
                     : "+a"(ax) : "b"(data), "c"(sector + 1), "d"(0) : "memory", "cc");
    return ax >> 8;
}
static void report(const char *what, u8 error) {
    say(what);
    if (error) { say(" error "); say_hex(error); }
}
static void visit(u8 drive, u8 count) {
    say("drive "); say_hex(drive);
    u8 error = drive < 0x80 ? floppy(2, 1) : disk(0x42, drive, 1);
    report(" read", error);
    if (!error) {
        data[31] = 0;
        say(" "); say((char *)data);
        report(" write", drive < 0x80 ? floppy(3, 2) : disk(0x43, drive, 2));
    }
    say("\n");
    (void)count;
}
void kernel(void) {
    u8 count = *(u8 *)0x475; /* BIOS data area: how many hard disks */
    com_open(COM1);
    say("drives "); say_number(count); say("\n");
    for (;;) {
        u8 key = com_get(COM1);
        if (key == 'g') {
            for (u8 i = 0; i < count; i++) visit(0x80 + i, count);
            if (*(u16 *)0x410 & 1) visit(0, count);
            say("all visited\n");
        } else if (key == 'w') {
            u32 written = 0;
            while (!(inb(COM1 + 5) & 1)) {
                for (int i = 0; i < 512; i += 4) *(u32 *)(data + i) = written;
                u8 error = disk(0x43, 0x80, 64 + written);
                if (error) { report("write", error); say("\n"); continue; }
                written++;
                if (written % 16 == 0) { say("wrote "); say_number(written); say("\n"); }
            }
            inb(COM1);
            say("in all "); say_number(written); say("\n");
        } else
            power_off();
    }
}
