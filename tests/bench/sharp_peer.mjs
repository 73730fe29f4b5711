// sharp as a user of it would call it on many files: `sharp_peer.mjs AT_A_TIME`.
//
// Each line on standard input is a folder and what to do, `resize` or `convert`: it is done to the folder's JPEGs, as many
// at a time as is said, and a line of JSON tells how long that took.
import { readdir } from "node:fs/promises";
import { createInterface } from "node:readline";
import sharp from "sharp";

const atATime = Number(process.argv[2]);
sharp.cache(false);
sharp.concurrency(atATime > 1 ? 1 : 0);

const WORK = {
  resize: (image) => image.resize(1024, 1024, { fit: "inside" }).jpeg({ quality: 80 }),
  convert: (image) => image.webp({ quality: 80 }),
};

for await (const line of createInterface({ input: process.stdin })) {
  const [folder, work] = line.split(" ");
  const names = (await readdir(folder)).filter((name) => name.endsWith(".jpg"));
  const began = performance.now();
  await Promise.all(
    Array.from({ length: atATime }, async () => {
      for (let name = names.pop(); name !== undefined; name = names.pop())
        await WORK[work](sharp(`${folder}/${name}`).autoOrient()).toFile(`${folder}/${name}.out`);
    }),
  );
  console.log(JSON.stringify({ seconds: (performance.now() - began) / 1000 }));
}
